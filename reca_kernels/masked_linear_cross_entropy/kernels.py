"""The functions of a backend of masked_linear_cross_entropy. Matmuls are torch's; see linear_chunks.py."""

from typing import NamedTuple, Protocol

from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions


class LabelledRows(NamedTuple):
    """The compacted rows that carry a label."""

    rows: Tensor  # int64 [M]: their indices, in order, padded at the end with -1
    labels: Tensor  # [M], padded with ignore_index
    losses: Tensor  # fp32 [N]: 0, and NaN for labelled rows beyond M
    scale: Tensor  # fp32 []: 1, or 1 / number of labels for reduction "mean"


class Kernels(Protocol):
    """The functions of a backend's file."""

    def compact_labelled_rows(
        self, labels: Tensor, options: CrossEntropyOptions, max_labelled: int | None
    ) -> LabelledRows:
        """Find the rows that carry a label among labels [N]. M is at most `max_labelled`, if given."""

    def gather_scatter_rows(
        self, source: Tensor, source_rows: Tensor | None, out: Tensor, out_rows: Tensor | None
    ) -> None:
        """Write out[out_rows[i]] = source[source_rows[i]], in the dtype of out.

        Rows of source and out are contiguous. Source row -1 reads zeros; out row -1 is skipped. One of the two is None
        and stands for i.
        """

    def row_gradients(
        self,
        logits: Tensor,  # [n, V], with a row stride that is a multiple of plan.PITCH
        bias: Tensor | None,  # [pitch]
        labels: Tensor,  # [n]
        rows: Tensor,  # [n]
        row_grad: Tensor | None,  # fp32 [N]
        scale: Tensor,  # fp32 []
        options: CrossEntropyOptions,
        losses: Tensor,  # fp32 [N]
        gradient: bool,
    ) -> None:
        """Write losses[rows[i]] of the logits plus bias; with `gradient`, overwrite the logits with their gradient.

        The gradient of row i is multiplied by scale, and by row_grad[rows[i]] if given.
        """

    def reduce(self, losses: Tensor, labels: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
        """Return (loss, scale)."""

    def scale(self, gradient: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write gradient times grad (fp32 []), rounded once, to out, which may be the same tensor as gradient."""
