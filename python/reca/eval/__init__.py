"""Evaluation: `reca eval SUITE RUN`, in four steps of which each can be skipped, repeated or fed from elsewhere.

    generate   images (or answers) of the model            suites/*.py say which, generate.py makes them
    judge      what a judge says of each, as it says it     judges/*.py, judge.py
    score      the benchmark's own rule, a pure function    suites/*.py, scoring.py
    report     intervals, the comparison, JSON and text     statistics.py, score_interval.py, report.py, figures.py

One folder holds an evaluation. `--out` names it; by default it is RUN/eval/SUITE, for a recipe evals/RECIPE/SUITE, and
for `--against base` RUN/eval/base/SUITE:

    generation.json   what made the images: model, sampling, seed, and a digest of every item's prompt and source
    images/           the images in the benchmark's own folder layout, which its own scripts read too
    answers.jsonl     in place of images/ where the model answers questions: {"item", "k", "digest", "answer"}
    records.jsonl     one line per image: {"item", "k", "picture", "digest", "judge", "answer"} or "error" in place of
                      "answer"
    results.json      below
    report.txt        the same as text

A record's `picture` is the SHA-256 of the image file. `digest` is of the item: its tag, prompt, source and metadata.
`judge` is {"name", "version", "dtype", "exact"}, and "options" where others decide its answers. `answer` is what the
judge said, before any rule. A record counts while its image, its item and its judge are these; others are judged again.
Images and answers of other prompts or sources are refused. A digest that an earlier release did not write contradicts
nothing.

results.json:

    format            1
    suite, protocol   such as "wise" and "WISE_Verified"; results of different suites are never compared
    model             {"source", "umm", "trained", "step", "dtype", "weights_sha256"}; null where unknown, the last
                      of a model in training, too
    sampling          all options of the model's sampler, defaults too, and "seed"; null where nothing is known
    images            folder that the paths of images below begin at; null without images
    images_per_item   of most items
    counts            {"items", "images", "failed", "missing"}
    judge             {"name", "version", "dtype", "exact", ...}
    overall           {"value", "interval": [low, high], "unit": "fraction", "percent" or "points"}; all values,
                      differences and intervals are in this unit: differences of percent are percentage points
    tags              {tag: {"value", "interval", "items", "images"}}
    metrics           every figure that the benchmark's own scripts print, by name
    items             [{"item", "tag", "prompt", "value", "images": [{"k", "path", "value", "reason"}]}]
    failed            [{"item", "k", "error"}]
    power             [{"images_per_item", "difference", "power"}]; null without a comparison
    against           null, or {"folder", "model", "items", "overall", "tags", "identical_settings", "differs",
                      "flips"}.
                      `items` counts the prompts that both have; `overall` and `tags` are of them: as above, and each
                      with "difference" and "difference_interval" (this minus that)
                      `flips` is [{"item", "tag", "prompt", "before", "after"}], gains first, by size
"""
