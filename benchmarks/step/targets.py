"""What a step is to reach, and what was predicted before it was measured."""

from typing import NamedTuple

from benchmarks.step.rows import StepRow


class Target(NamedTuple):
    """Hold what a step of a model is to reach.

    ratio: seconds of the released form over ours, at least. product: share of the measured matmul peak, at least: of
    the FLOPs that are computed on a CPU, of the useful ones (MFU) on a GPU. memory: peak over the release's, at most.
    predicted: what was said before of the ratio, and on which grounds.
    """

    ratio: float
    product: float
    memory: float | None
    predicted: str


# (kind of device, size) -> model -> target
TARGETS = {
    ("cpu", "narrow"): {
        "show_o": Target(1.7, 0.95, None, "1.64 to 1.75, measured against the released code"),
        "open_uni": Target(1.3, 0.95, None, "1.30 with AdamW and 1.21 without, measured against the released code"),
        "bagel": Target(1.3, 0.95, 0.6, "1.25 with AdamW and 1.20 without at 0.62 of the memory, measured likewise"),
        "harmon": Target(1.25, 0.95, None, "1.18 with AdamW and 1.12 without, measured against the released code"),
    },
    ("cuda", "real"): {
        "show_o": Target(2.0, 0.55, 0.6, "42 ms of matmuls, head 1.6 and 50 ms of eager elementwise work a pass of 2"),
        "open_uni": Target(1.5, 0.55, 0.6, "172 ms of matmuls and 64 of elementwise work in SANA a pass of 42"),
        "bagel": Target(2.0, 0.55, 0.6, "710 ms of matmuls and 123 of elementwise work a pass of 2"),
        "harmon": Target(1.5, 0.45, 0.6, "1892 ms of matmuls and 937 of elementwise work a pass of 48"),
    },
    # The released form of a whole BAGEL has gradients and moments of both experts, more than one card holds.
    ("cuda", "quarter"): {"bagel": Target(2.0, 0.55, 0.6, "as the whole model")},
}


class Verdict(NamedTuple):
    """One target beside what was measured."""

    what: str
    target: float
    measured: float
    met: bool
    reachable: str = ""  # what it is by the count of FLOPs, or with nothing lost: other operators at the copy's rate


def target_of(row: StepRow) -> Target | None:
    kind = "cuda" if row.driver else "cpu"
    return TARGETS.get((kind, row.size), {}).get(row.model)


def share(row: StepRow) -> float:
    """Return the share of the matmul peak that the target is about."""
    return row.mfu if row.driver else row.product_share


def verdicts(ours: StepRow, release: StepRow) -> list[Verdict]:
    """Return every target of a model beside what was measured."""
    target = target_of(ours)
    if target is None:
        return []
    name = "MFU" if ours.driver else "share of the matmul peak"
    most = share(ours) * ours.seconds_p50 / ours.roofline_s
    found = [Verdict(name, target.product, share(ours), share(ours) >= target.product, f"roofline {most:.2f}")]
    ratio, counted = release.seconds_p50 / ours.seconds_p50, release.flops / ours.flops
    found.append(Verdict("release / ours", target.ratio, ratio, ratio >= target.ratio, f"FLOPs {counted:.2f}"))
    if target.memory is not None:
        memory = ours.peak_gib / release.peak_gib
        found.append(Verdict("memory, ours / release", target.memory, memory, memory <= target.memory))
    return found
