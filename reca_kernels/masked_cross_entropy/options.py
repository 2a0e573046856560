"""The options of both forms of cross-entropy."""

from typing import NamedTuple


class CrossEntropyOptions(NamedTuple):
    """The loss of a row is (1 - label_smoothing) nll + label_smoothing mean_j(-log p_j) + z_loss logsumexp²."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: str  # mean, sum, none


SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction"
