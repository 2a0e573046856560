"""Evaluation: `reca eval SUITE RUN`, in four steps that can each be skipped, repeated or given external inputs.

    generate   images (or answers) of the model             suites/*.py define the items, generate.py runs the model
    judge      the judge's raw answer about each image      judges/*.py, judge.py
    score      the benchmark's own rule, a pure function    suites/*.py, scoring.py
    report     intervals, comparison, JSON and text         statistics.py, score_interval.py, report.py, figures.py

evaluation.py runs the steps for both models. settings.py has its options, targets.py the models, inputs.py the images,
and checks.py what is checked before anything is loaded.

The output folder is RUN/eval/STEP/SUITE, where STEP is that of the checkpoint: of a run the newest; with --ema it is
SUITE_ema. For a recipe or `--against base` it is RUN/eval/base/SUITE. `--out` is another one:

    generation.json   model, sampling options and seed of the images, and a digest of each item's prompt and source
    images/           the images in the benchmark's own folder layout, readable by its scripts
    answers.jsonl     instead of images/ if the model answers questions: {"item", "k", "digest", "answer"}
    records.jsonl     one line per image: {"item", "k", "picture", "digest", "judge", "answer"}, or "error" instead of
                      "answer"
    results.json      see below
    report.txt        the same as text

`picture` is the SHA-256 of the image file. `digest` is that of the item's tag, prompt, source and metadata. `judge` is
{"name", "version", "dtype", "exact"}, and "options" if other settings affect its answers. `answer` is the judge's raw
answer, before any rule. A record is reused only for the same image, item and judge; otherwise the image is judged
again. Images and answers of other prompts or sources are an error. A digest missing from files of earlier releases is
not checked.

results.json:

    format            1
    suite, protocol   such as "wise" and "WISE_Verified"; results of different suites are never compared
    model             {"source", "umm", "trained", "step", "ema", "dtype", "weights_sha256"}; null if unknown. ema:
                      whether it is the moving average of the weights. weights_sha256 is null during training
    sampling          all options of the model's sampler, including defaults, and "seed"; null if unknown
    images            folder to which the image paths below are relative; null without images
    images_per_item   images per item, the most frequent number
    counts            {"items", "images", "failed", "missing"}
    judge             {"name", "version", "dtype", "exact", ...}
    overall           {"value", "interval": [low, high], "unit": "fraction", "percent" or "points"}; all values,
                      differences and intervals are in this unit; differences of percent are percentage points
    tags              {tag: {"value", "interval", "items", "images"}}
    metrics           all metrics that the benchmark's own scripts print, by name
    items             [{"item", "tag", "prompt", "digest", "value", "images": [{"k", "path", "value", "reason"}]}];
                      digest is null if the source is unknown
    failed            [{"item", "k", "error"}]
    power             [{"images_per_item", "difference", "power"}]; null without a comparison or without variance
    against           null, or {"folder", "model", "items", "overall", "tags", "identical_settings", "differs",
                      "flips"}.
                      `items` is the number of prompts in both evaluations, to which `overall` and `tags` refer: as
                      above, with "difference" and "difference_interval" (this evaluation minus the other)
                      `flips` is [{"item", "tag", "prompt", "before", "after"}], from the largest gain to the largest
                      loss
"""
