"""The command `reca compare`."""

import argparse
from pathlib import Path

from reca.arguments import as_path, takes_pairs


def add(sub: argparse.ArgumentParser) -> None:
    """Add the options of `reca compare`."""
    sub.add_argument("before", help="folder of a run, checkpoint or evaluation; or base: what AFTER started from")
    sub.add_argument("after", help="the same; base: what BEFORE started from")
    sub.add_argument("--out", type=as_path, metavar="DIR", help="output folder (default: RUN/comparison)")
    sub.add_argument(
        "--pairs", type=int, metavar="N", default=60, help="image pairs to show per suite (default: %(default)s)"
    )
    sub.add_argument(
        "--reconstructions",
        type=int,
        metavar="N",
        help="number of images that both models reconstruct (default: 8, or 0 for large models without a GPU)",
    )
    sub.add_argument(
        "--images",
        metavar="SPEC",
        help="images to reconstruct, in any form of data.images (default: the run's held-out or training images)",
    )
    takes_pairs(sub, "--sampling", "sampling option of the reconstructions")


def run(options: argparse.Namespace) -> None:
    """Write the page and comparison.json, and print the overall score of every suite and the notes."""
    from reca.comparison import build, triplets
    from reca.comparison.sides import find_sides
    from reca.eval import figures
    from reca.io.folders import COMPARISON, ensure_writable
    from reca.options.sampling import read_pairs
    from reca.runs.lineage import trained_source

    sampling = read_pairs(options.sampling, "--sampling")
    if options.pairs < 0:
        raise ValueError(f"--pairs must be at least 0, got {options.pairs}")
    if options.reconstructions is not None and options.reconstructions < 0:
        raise ValueError(f"--reconstructions must be at least 0, got {options.reconstructions}")
    named = Path(options.before if options.after == "base" else options.after)
    trained = trained_source(named)
    out = options.out or (trained[0] if trained else named) / "comparison"
    find_sides(options.before, options.after)  # raises for names that are none, before the folder is made
    ensure_writable(out, "--out", COMPARISON)
    found = build.compare(options.before, options.after)
    count = options.reconstructions
    if count is None:
        count = triplets.COUNT if options.images else triplets.usual_count(options.before, options.after)
    if count:
        found["reconstructions"] = triplets.draw(
            options.before, options.after, out, count, options.images, sampling=sampling
        )
    page = build.write(found, out, options.pairs)
    for suite in found["suites"]:
        change, unit = suite["against"]["overall"], suite["overall"]["unit"]
        print(
            f"{suite['protocol']}: {figures.score(change['value'], unit)} -> "
            f"{figures.score(suite['overall']['value'], unit)}, {figures.difference(change['difference'], unit)} "
            f"{figures.bounds(change['difference_interval'], unit, sign=True)}"
        )
        print(f"  {suite['of']['before']} -> {suite['of']['after']}")
    if found["understanding"]:
        print(found["understanding"]["text"])
    for note in found["notes"]:
        print(note)
    print(page)
