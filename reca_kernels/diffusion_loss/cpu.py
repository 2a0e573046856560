"""The diffusion loss on CPUs: csrc/cpu/diffusion_loss.cpp."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox
from reca_kernels.philox.cpu import address


def prepare(x0: Tensor, t: Tensor, noise: Philox | Tensor, table: Tensor, rows: Tensor | None, out: Tensor) -> None:
    native.module.diffusion_prepare(_arguments(x0, t, noise, table, rows), native.DTYPES[out.dtype], out.data_ptr())


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
    native.module.diffusion_loss(
        _arguments(x0, t, noise, table, rows),
        native.DTYPES[out.dtype],
        out.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        losses.data_ptr(),
    )
    return losses


def _arguments(x0: Tensor, t: Tensor, noise: Philox | Tensor, table: Tensor, rows: Tensor | None) -> Any:
    """The native struct. It holds addresses only: the tensors must outlive the call."""
    return native.module.Diffusion(
        native.DTYPES[x0.dtype],
        x0.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        t.data_ptr(),
        table.data_ptr(),
        len(t),
        x0.shape[1],
        *address(noise),
        torch.get_num_threads(),
    )
