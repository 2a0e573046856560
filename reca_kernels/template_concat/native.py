"""Gather, add and concatenate rows, with gradients, in C++ and CUDA: csrc/template_concat."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.template_concat import row_gradients


def forward(
    sources: Sequence[tuple[Tensor, Tensor, bool]],  # rows [K, D], index [T], negated
    out_dtype: torch.dtype,
) -> Tensor:  # [T, D]
    (table, src, _), *_ = sources
    out = torch.empty(src.shape[0], table.shape[1], dtype=out_dtype, device=table.device)
    if out.numel() > 0:
        packed = [
            (native.DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0), rows.shape[0], _index(index, negated))
            for rows, index, negated in sources
        ]
        native.kernels().template_concat_forward(
            packed, *out.shape, native.DTYPES[out_dtype], out.data_ptr(), native.launch(out)
        )
    return out


def backward(
    grad: Tensor,  # [T, D]
    index: Tensor,  # [T]
    negated: bool,
    count: int,
    dtype: torch.dtype,
) -> Tensor:  # [count, D]
    (length, width), device = grad.shape, grad.device
    if 0 in (length, width, count):
        return torch.zeros(count, width, dtype=dtype, device=device)
    out = torch.empty(count, width, dtype=dtype, device=device)
    gradient = (
        native.DTYPES[grad.dtype], grad.data_ptr(), grad.stride(0), length, width, _index(index, negated), count,
        native.DTYPES[dtype], out.data_ptr(),
    )  # fmt: skip
    module, launch = native.kernels(), native.launch(out)
    if launch.on_host:
        workspace = torch.empty(count + 1 + length, dtype=torch.int64, device=device)
        module.template_concat_backward(gradient, workspace.data_ptr(), launch)
    elif row_gradients.mostly_once(index, negated, count):
        used = torch.zeros(2, count, dtype=torch.int64, device=device)
        module.template_concat_backward_mapped(gradient, used.data_ptr(), launch)
    else:
        by_row = row_gradients.by_row(index, negated, count)
        sums = row_gradients.workspace(length, width, device)
        module.template_concat_backward_sorted(
            gradient,
            _index(by_row.rows, False),
            by_row.places.data_ptr(),
            by_row.starts.data_ptr(),
            sums.data_ptr(),
            launch,
        )
    return out


def _index(index: Tensor, negated: bool) -> tuple[int, bool, bool]:
    return index.data_ptr(), index.dtype == torch.int64, negated
