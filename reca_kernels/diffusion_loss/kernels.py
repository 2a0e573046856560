"""The functions of a backend of diffusion_loss."""

from typing import Protocol

from torch import Tensor

from reca_kernels.philox.address import Philox


class Kernels(Protocol):
    """Tensors are contiguous. Row m uses x0[rows[m]], or x0[m] without rows. noise: one id per row, or [M, C]."""

    def add_noise(
        self,
        x0: Tensor,  # [N, C]
        t: Tensor,  # int64 [M]
        noise: Philox | Tensor,
        table: Tensor,  # fp32 [steps, 8]
        rows: Tensor | None,  # int64 [M]
        out: Tensor,  # [M, C]
    ) -> None:
        """Write x_t into out."""

    def losses(
        self,
        out: Tensor,  # [M, 2 C]
        x0: Tensor,  # [N, C]
        t: Tensor,  # [M]
        noise: Philox | Tensor,
        table: Tensor,  # [steps, 8]
        rows: Tensor | None,  # [M]
        gradient: Tensor | None,  # [M, 2 C]
    ) -> Tensor:
        """Return the loss per row, fp32 [M]. Write its derivative with respect to out into gradient."""
