"""What a backend of masked_linear_cross_entropy holds, besides torch's matrix products: see linear_chunks.py."""

from typing import NamedTuple, Protocol

from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions


class LabelledRows(NamedTuple):
    """The rows that carry a label, moved up."""

    rows: Tensor  # int64 [M]: their numbers, in order; padding at the end: -1
    labels: Tensor  # [M]; of padding: ignore_index
    losses: Tensor  # fp32 [N]: 0; NaN for a labelled row that does not fit into M
    scale: Tensor  # fp32 []: 1, or 1 / number of labels for reduction "mean"


class Kernels(Protocol):
    """What a backend's file holds."""

    def compact_labelled_rows(
        self, labels: Tensor, options: CrossEntropyOptions, max_labelled: int | None
    ) -> LabelledRows:
        """Find the rows that carry a label [N]. M is at most `max_labelled`, where that is given."""

    def gather_scatter_rows(
        self, source: Tensor, source_rows: Tensor | None, out: Tensor, out_rows: Tensor | None
    ) -> None:
        """Write out[out_rows[i]] = source[source_rows[i]], in the dtype of out.

        A source row -1 is zeros, an out row -1 is nowhere. One of the two is None: i.
        """

    def row_gradients(
        self,
        x: Tensor,  # [n, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [pitch]
        logits: Tensor,  # [n, pitch]
        labels: Tensor,  # [n]
        rows: Tensor,  # [n]
        row_grad: Tensor | None,  # fp32 [N]
        scale: Tensor,  # fp32 []
        options: CrossEntropyOptions,
        losses: Tensor,  # fp32 [N]
        gradient: bool,
    ) -> None:
        """Write losses[rows[i]] of the logits x weight^T + bias, and over the logits their gradient, if asked for.

        The gradient of row i is multiplied by scale, and by row_grad[rows[i]].
        """

    def reduce(self, losses: Tensor, labels: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
        """Return (loss, scale)."""

    def scale(self, gradient: Tensor, grad: Tensor) -> Tensor:
        """Return gradient times grad (fp32 []), rounded once. It may be `gradient` itself where grad is 1."""
