"""The functions of a backend of masked_cross_entropy."""

from typing import Protocol

from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions


class Kernels(Protocol):
    """Rows of logits are contiguous; the stride between rows is arbitrary."""

    def forward(
        self,
        logits: Tensor,  # [N, V]
        labels: Tensor,  # [N], contiguous
        options: CrossEntropyOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss [] or [N], stats [N, 2], scale []), all fp32.

        stats are a row's maximum logit m and log(sum exp(z - m)), stored separately because their sum loses digits when
        all logits share a large offset. scale is the factor of the reduction for gradients, on the device.
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
        """Write the gradient with respect to the logits into out."""
