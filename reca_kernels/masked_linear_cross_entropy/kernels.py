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

    def adds_bias(self, logits: Tensor) -> bool:
        """Return whether row_gradients adds the bias to the logits. If not, their product does."""

    def row_gradients(
        self,
        logits: Tensor,  # [n, V], a pitch of whole plan.PITCH elements
        bias: Tensor | None,  # [pitch]
        labels: Tensor,  # [n]
        rows: Tensor,  # [n]
        row_grad: Tensor | None,  # fp32 [N]
        scale: Tensor,  # fp32 []
        options: CrossEntropyOptions,
        losses: Tensor,  # fp32 [N]
        gradient: bool,
    ) -> None:
        """Write losses[rows[i]] of the logits plus bias, and over the logits their gradient, if asked for.

        The gradient of row i is multiplied by scale, and by row_grad[rows[i]].
        """

    def reduce(self, losses: Tensor, labels: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
        """Return (loss, scale)."""

    def scale(self, gradient: Tensor, grad: Tensor, out: Tensor) -> None:
        """Write gradient times grad (fp32 []), rounded once, to out, which may be gradient."""
