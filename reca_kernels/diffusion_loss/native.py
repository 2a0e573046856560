"""The diffusion loss in C++ and CUDA: csrc/diffusion_loss."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox
from reca_kernels.philox.native import address, explicit


def add_noise(x0: Tensor, t: Tensor, noise: Philox | Tensor, table: Tensor, rows: Tensor | None, out: Tensor) -> None:
    numbers = explicit(noise)
    native.kernels().diffusion_add_noise(
        _arguments(x0, t, noise, numbers, table, rows), native.DTYPES[out.dtype], out.data_ptr(), native.launch(out)
    )


def losses(
    out: Tensor,  # [M, 2 C]
    x0: Tensor,  # [N, C]
    t: Tensor,  # [M]
    noise: Philox | Tensor,
    table: Tensor,  # [steps, 8]
    rows: Tensor | None,  # [M]
    gradient: Tensor | None,  # [M, 2 C]
) -> Tensor:  # fp32 [M]
    losses = torch.empty(len(t), dtype=torch.float32, device=out.device)
    numbers = explicit(noise)
    native.kernels().diffusion_loss(
        _arguments(x0, t, noise, numbers, table, rows),
        native.DTYPES[out.dtype],
        out.data_ptr(),
        native.address(gradient),
        losses.data_ptr(),
        native.launch(out),
    )
    return losses


def _arguments(
    x0: Tensor, t: Tensor, noise: Philox | Tensor, numbers: Tensor | None, table: Tensor, rows: Tensor | None
) -> tuple[object, ...]:
    """Return a Diffusion (csrc/diffusion_loss/op.h)."""
    return (
        native.DTYPES[x0.dtype],
        x0.data_ptr(),
        native.address(rows),
        t.data_ptr(),
        table.data_ptr(),
        len(t),
        x0.shape[1],
        x0.shape[0],
        table.shape[0],
        address(noise),
        native.address(numbers),
    )
