"""Studies: several ways to post-train one model, side by side, against what the paper found. `reca study NAME`.

    catalog/     the studies, one file each: question, what the paper says, arms, claims
    study.py     what such a file may hold
    task.py      what is asked of a study, and what one process does of it
    plan.py      a study's arms as tasks: recipe, overrides and folder of every arm and seed
    check.py     the arms' recipes, before anything runs
    world.py     the embedded world: pre-training of the start, measuring
    published.py recipes with published weights, measured by `reca eval`
    work.py      what a process does for one task
    runner.py    all tasks side by side; what is done already is not done again
    judge.py     intervals over seeds, and whether a claim holds
    report.py    the page and the JSON
    slurm.py     the same tasks as arrays of SLURM jobs

A folder of studies (`--out`) holds, beside a folder of each study with study.html and study.json:

    starts/   pre-trained models of the embedded world
    arms/     runs. An arm that several studies have in common is run once.

study.json:

    study, question, paper   as in the catalogue
    setting, place (name of the embedded world), umm, recipe, seeds, scale, command
    arms      [{"name", "about", "overrides", "results": {seed: {"measures": {name: {"value", "interval", "hits",
              "trials"}}, "curve": [[step, loss]], "seconds", "folder"}}, "means": {name: {"value", "interval"}}}];
              a result that is missing is {"failed": why}
    failed    ["SEED/start: why"] of starts; [] if there is none
    omitted   {arm: why this model has it not}
    claims    [{"says", "measure", "arm", "than", "difference", "interval", "verdict"}]
    verdict   agrees, agrees in part, disagrees, open or not measured
"""
