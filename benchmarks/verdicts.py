"""python -m benchmarks.verdicts [--device cpu|cuda]: print a table of measurements and targets.

For each op and shape, and each whole training step: ours, the best rival, their ratio, the share of the ceiling, and
whether the target is met. The ceiling of an op is the rate of a copy or of a matmul, whichever is closer; that of a
step is the rate of a matmul.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import ALONE, BY_SIZE, CEILING, OURS, RESULTS, Row, all_results, complete, floor_ms
from benchmarks.step import report, rows, targets


class Target(NamedTuple):
    """Minimum values to reach. None: no target.

    share  share of the ceiling
    ratio  the best rival's time over ours
    alone  the time of the matmuls that the op requires over ours
    """

    share: float | None
    ratio: float | None
    alone: float | None = None


# (device type, op, dtype; "" for any) -> target
TARGETS = {
    ("cuda", "template_concat", ""): Target(0.85, 1.2),
    ("cuda", "masked_cross_entropy", ""): Target(0.80, 1.1),
    ("cuda", "masked_linear_cross_entropy", ""): Target(0.85, 1.0, 0.95),
    ("cuda", "row_gradients", ""): Target(0.82, None),
    ("cuda", "flow_matching", "bfloat16"): Target(0.65, 1.0),
    ("cuda", "flow_matching", "float32"): Target(0.80, 1.0),
    ("cuda", "diffusion_loss", ""): Target(None, 2.0),
    ("cuda", "attention", ""): Target(None, 2.5),
    ("cpu", "masked_cross_entropy", ""): Target(0.60, None),
}


class Verdict(NamedTuple):
    """One line of the table."""

    what: str
    ours: str
    rival: str
    ratio: float | None
    share: float | None
    alone: float | None
    target: str
    met: str  # yes, no, or empty without a target


def verdicts(kind: str, folder: Path = RESULTS) -> list[Verdict]:
    """Return the lines of all results of a device type, ops first."""
    found = [line for measured in all_results(kind, folder) for line in _of_ops(kind, measured)]
    for measured in rows.all_results(folder / rows.FOLDER.name):
        if (measured[0].driver != "") == (kind == "cuda"):
            found += _of_steps(measured)
    return found


def _of_ops(kind: str, measured: list[Row]) -> Iterator[Verdict]:
    whole = [row for row in complete(measured) if row.op != CEILING and not row.shape.startswith(BY_SIZE)]
    for case in dict.fromkeys(row.case for row in whole):
        group = [row for row in whole if row.case == case]
        own = min((row for row in group if row.provider.startswith(OURS)), key=lambda row: row.ms_p50, default=None)
        others = [row for row in group if not row.provider.startswith(OURS)]
        rival = min((row for row in others if row.provider != ALONE), key=lambda row: row.ms_p50, default=None)
        alone = next((row for row in others if row.provider == ALONE), None)
        if own is None:
            continue
        target = TARGETS.get((kind, own.op, own.dtype)) or TARGETS.get((kind, own.op, "")) or Target(None, None)
        yield _verdict(
            ", ".join(part for part in case if part not in ("clock", "events")),
            f"{own.ms_p50:.4g} ms",
            f"{rival.provider} {rival.ms_p50:.4g} ms" if rival else "none ran",
            rival.ms_p50 / own.ms_p50 if rival else None,
            floor_ms(own) / own.ms_p50 or None,
            target,
            alone.ms_p50 / own.ms_p50 if alone else None,
        )


def _of_steps(measured: list[rows.StepRow]) -> Iterator[Verdict]:
    for own in (row for row in measured if row.form == "ours" and row.measured):
        rival = next((other for ours, other in report.pairs(measured) if ours is own and other.form == "release"), None)
        goal = targets.target_of(own)
        yield _verdict(
            f"step of {own.model}, {own.size}",
            f"{own.seconds_p50:.4g} s",
            f"release {rival.seconds_p50:.4g} s" if rival else "none ran",
            rival.seconds_p50 / own.seconds_p50 if rival else None,
            targets.share(own),
            Target(goal.product, goal.ratio) if goal else Target(None, None),
        )


def _verdict(
    what: str,
    ours: str,
    rival: str,
    ratio: float | None,
    share: float | None,
    target: Target,
    alone: float | None = None,
) -> Verdict:
    wanted = [f"{100 * target.share:.0f} %"] if target.share is not None else []
    wanted += [f"{target.ratio:g} x"] if target.ratio is not None else []
    wanted += [f"{target.alone:g} of products"] if target.alone is not None else []
    asked = [(share, target.share), (ratio, target.ratio), (alone, target.alone)]
    results = [got is not None and got >= least for got, least in asked if least is not None]
    met = "" if not results else "yes" if all(results) else "no"
    return Verdict(what, ours, rival, ratio, share, alone, " and ".join(wanted), met)


def table(kind: str, folder: Path = RESULTS) -> str:
    """Return the table as text."""
    lines = [("op or step", "ours", "best rival", "ratio", "of ceiling", "of products", "target", "met")]
    for v in verdicts(kind, folder):
        ratio = "" if v.ratio is None else f"{v.ratio:.2f} x"
        share = "" if v.share is None else f"{100 * v.share:.0f} %"
        alone = "" if v.alone is None else f"{v.alone:.2f}"
        lines.append((v.what, v.ours, v.rival, ratio, share, alone, v.target, v.met))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verdicts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    print(table(parser.parse_args(arguments).device))


if __name__ == "__main__":
    main(sys.argv[1:])
