"""The functions of a backend of flow_matching."""

from typing import Protocol

from torch import Tensor

from reca_kernels.philox.address import Philox


class Kernels(Protocol):
    """Batches are contiguous, [n, C, H, W], of one dtype. Explicit noise is contiguous, in the prediction's order."""

    def add_noise(
        self,
        batches: list[Tensor],
        t: Tensor,  # fp32 [B]
        noise: Philox | Tensor,
        patch: int,
        out: Tensor,
    ) -> None:
        """Write x_t of all images, flattened and concatenated, into out."""

    def losses(
        self,
        pred: Tensor,
        batches: list[Tensor],
        noise: Philox | Tensor,
        patch: int,
        gradient: Tensor | None,  # like pred
    ) -> Tensor:
        """Return the sum of squared errors per image, fp32 [B]. Write its derivative w.r.t. pred into gradient."""
