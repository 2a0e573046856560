"""Targets for training steps, and predictions made before they were measured."""

from typing import NamedTuple

from benchmarks.step.rows import StepRow


class Target(NamedTuple):
    """The targets for a model's step.

    ratio      least ratio of the released form's time to ours
    product    least share of the measured matmul peak: of all FLOPs on a CPU, of useful FLOPs (MFU) on a GPU
    memory     greatest ratio of our peak memory to the release's
    predicted  the predicted ratio and its basis
    """

    ratio: float
    product: float
    memory: float | None
    predicted: str


# (device type, size) -> model -> target
TARGETS = {
    ("cpu", "narrow"): {
        "show_o": Target(1.7, 0.95, None, "1.64 to 1.75, measured against the released code"),
        "open_uni": Target(1.3, 0.95, None, "1.30 with AdamW and 1.21 without, measured against the released code"),
        "bagel": Target(
            1.3, 0.95, 0.6, "1.25 with AdamW and 1.20 without at 0.62 of the memory, measured against the released code"
        ),
        "harmon": Target(1.25, 0.95, None, "1.18 with AdamW and 1.12 without, measured against the released code"),
    },
    ("cuda", "real"): {
        "show_o": Target(
            2.0,
            0.55,
            0.6,
            "per micro-batch of 2: 42 ms of matmuls, 1.6 ms of head, 50 ms of eager elementwise operations",
        ),
        "open_uni": Target(
            1.5, 0.55, 0.6, "per micro-batch of 42: 172 ms of matmuls, 64 ms of elementwise operations in SANA"
        ),
        "bagel": Target(2.0, 0.55, 0.6, "per micro-batch of 2: 710 ms of matmuls, 123 ms of elementwise operations"),
        "harmon": Target(1.5, 0.45, 0.6, "per micro-batch of 48: 1892 ms of matmuls, 937 ms of elementwise operations"),
    },
    # The released form of the whole BAGEL has gradients and moments of both experts, too large for one GPU.
    ("cuda", "quarter"): {"bagel": Target(2.0, 0.55, 0.6, "as for the whole model")},
}


class Verdict(NamedTuple):
    """A target and its measurement."""

    what: str
    target: float
    measured: float
    met: bool
    reachable: str = ""  # the value by the count of FLOPs, or at the roofline


def target_of(row: StepRow) -> Target | None:
    kind = "cuda" if row.driver else "cpu"
    return TARGETS.get((kind, row.size), {}).get(row.model)


def share(row: StepRow) -> float:
    """Return the share of the matmul peak to which the target refers."""
    return row.mfu if row.driver else row.product_share


def verdicts(ours: StepRow, release: StepRow) -> list[Verdict]:
    """Return every target of a model with its measurement."""
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
