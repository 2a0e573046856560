"""Studies: comparisons of several ways to post-train a model with the paper's findings. `reca study NAME`.

    catalog/     one file per study: question, findings of the paper, variants, claims
    study.py     format of these files
    task.py      settings of a study, and its tasks, each run by one process
    plan.py      variants as tasks: recipe, overrides and folder for every variant and seed
    check.py     validation of the variants' recipes before anything runs
    toy.py       toy datasets: pre-training, measurement
    published.py recipes with published weights, measured by `reca eval`
    work.py      execution of one task
    runner.py    parallel execution of all tasks that are not done yet
    judge.py     confidence intervals over seeds, and verdicts on claims
    report.py    HTML page and JSON
    slurm.py     the same tasks as SLURM job arrays

The output folder (`--out`) has a folder for each study, with study.html and study.json, and in addition:

    pretrained/   models pre-trained on toy datasets
    variants/     runs of variants. A variant that several studies share is run once.

study.json:

    study, question, paper, open  as in the catalogue
    setting, dataset (name of the toy dataset), umm, recipe, seeds, scale, command
    variants  [{"name", "about", "overrides", "results": {seed: {"measures": {name: {"value", "interval", "hits",
              "trials"}}, "curve": [[step, loss]], "seconds", "folder"}}, "means": {name: {"value", "interval"}}}];
              a missing result is {"failed": reason}
    failed    ["SEED/pretrained: reason"] for pre-training that failed
    omitted   {variant: reason why this model lacks it}
    claims    [{"says", "measure", "variant", "than", "difference", "interval", "verdict"}]
    verdict   agrees, agrees in part, disagrees, open or not measured
"""
