"""What a backend of masked_cross_entropy holds."""

from typing import Protocol

from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions


class Kernels(Protocol):
    """The elements of a row of logits lie side by side, rows at any distance."""

    def forward(
        self,
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N], contiguous
        options: CrossEntropyOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss [] or [N], stats [N, 2], scale []), all fp32.

        stats holds a row's largest logit m and log(sum exp(z - m)): their sum would lose digits when all logits share a
        large offset. scale is what the reduction multiplies gradients with, on the device.
        """

    def backward(
        self,
        grad: Tensor,  # fp32 [] or [N]
        scale: Tensor,  # []
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N]
        stats: Tensor,  # [N, 2]
        options: CrossEntropyOptions,
        out: Tensor,  # [N, V], in the dtype of the logits; may be the logits
    ) -> None:
        """Write the gradient over the logits into out."""
