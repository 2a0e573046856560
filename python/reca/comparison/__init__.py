"""Comparison of two models: `reca compare BEFORE AFTER` writes a self-contained HTML page and comparison.json.

    sides.py    resolution of BEFORE and AFTER: a run, the model that a run started from, or an evaluation folder
    weights.py  tensors that training changed, and whether understanding uses any of them
    curves.py   losses and settings of both
    triplets.py images that both reconstruct
    build.py    the comparison as JSON
    page.py     the HTML page

comparison.json:

    before, after   {"source", "kind": "run", "base" or "evaluation", "step"}
    suites          results.json of `after` (see reca.eval) with `against` filled in, for every suite that both have, by
                    `reca eval` or else during training; and "of": {"before", "after"}, which names the weights
    curves          [{"name", "before": [[step, value]], "after": [[step, value]]}] of losses; [] without a run
    settings        [{"key", "before", "after"}] of recipe keys that differ; [] unless both are runs
    understanding   {"identical", "changed", "tensors", "text"}; null if a side has no weights, or if the two were not
                    loaded from the same files with the same model.* keys
    reconstructions {"pictures": "held-out", "training" or "given", "source", "rows": [{"name", "input", "before",
                    "after"}]} with paths relative to this file; `source` is the value of --images; null without
                    reconstructions
    notes           sentences about results that are missing or not compared
"""
