"""Two models side by side: `reca compare BEFORE AFTER`, one HTML page that needs no other file, and the same as JSON.

    sides.py    what BEFORE and AFTER name: a run, the model a run started from, the folder of an evaluation
    weights.py  which tensors training changed, and whether understanding uses one of them
    curves.py   losses and settings of both
    triplets.py images that both reconstruct
    page.py     the page

comparison.json:

    before, after   {"source", "kind": "run", "base" or "evaluation", "step"}
    suites          results.json of `after` (see reca.eval) with `against` filled in, one for every suite that both have
    curves          [{"name", "before": [[step, value]], "after": [[step, value]]}] of losses; [] without a run
    settings        [{"key", "before", "after"}] of recipe keys that differ; [] unless both are runs
    understanding   {"identical", "tensors", "text"}; null where a side has no weights, or the two were not loaded from
                    the same files with the same model.* keys
    reconstructions {"pictures": "held-out", "training" or "given", "source", "rows": [{"name", "input", "before",
                    "after"}]} with paths below the folder of this file; `source` names the images that were given;
                    null where none were drawn
    notes           what is missing, as sentences
"""
