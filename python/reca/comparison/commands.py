"""`reca compare`."""

import argparse
from pathlib import Path


def add(sub: argparse.ArgumentParser, path) -> None:
    """Add the options of `reca compare`. path: the type of arguments that are paths."""
    sub.add_argument("before", help="the folder of a run or of an evaluation; or base: what AFTER started from")
    sub.add_argument("after", help="the same; base: what BEFORE started from")
    sub.add_argument("--out", type=path, metavar="DIR", help="folder of the page; RUN/comparison by default")
    sub.add_argument("--pictures", type=int, default=60, help="pairs of pictures in the page, of every suite")


def run(options: argparse.Namespace) -> None:
    """Write the page and print the headline of every suite."""
    from reca import comparison
    from reca.folders import ensure_writable

    if options.pictures < 0:
        raise ValueError(f"--pictures must be at least 0, got {options.pictures}")
    named = options.before if options.after == "base" else options.after
    out = options.out or Path(named) / "comparison"
    found = comparison.compare(options.before, options.after)
    ensure_writable(out, "--out")
    page = comparison.write(found, out, options.pictures)
    for suite in found["suites"]:
        change = suite["against"]["overall"]
        scale = 100 if suite["overall"]["unit"] == "fraction" else 1
        low, high = ("?" if bound is None else f"{scale * bound:+.2f}" for bound in change["difference_interval"])
        print(
            f"{suite['protocol']}: {scale * change['value']:.2f} -> {scale * suite['overall']['value']:.2f}, "
            f"{scale * change['difference']:+.2f} [{low}, {high}]"
        )
    if found["understanding"]:
        print(found["understanding"]["text"])
    for note in found["notes"]:
        print(note)
    print(page)
