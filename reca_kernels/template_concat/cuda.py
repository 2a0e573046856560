"""Gather, add and concatenate rows, and their gradients, on CUDA devices: csrc/cuda/template_concat.cu."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.template_concat import row_gradients
from reca_kernels.template_concat.cpu import native_source


def forward(
    sources: Sequence[tuple[Tensor, Tensor, bool]],  # rows [K, D], index [T], flipped
    out_dtype: torch.dtype,
) -> Tensor:  # [T, D]
    (table, src, _), *_ = sources
    out = torch.empty(src.shape[0], table.shape[1], dtype=out_dtype, device=table.device)
    if out.numel() > 0:
        packed = [native_source(native.module.cuda, *source) for source in sources]
        native.module.cuda.template_concat_forward(
            packed, *out.shape, native.DTYPES[out_dtype], out.data_ptr(), *native.launch(out)
        )
    return out


def backward(
    grad: Tensor,  # [T, D]
    index: Tensor,  # [T]
    flipped: bool,
    rows: Tensor,  # [K, D], only its shape and dtype count
) -> Tensor:  # [K, D]
    length, width = grad.shape
    count = rows.shape[0]
    if length == 0 or rows.numel() == 0:
        return torch.zeros(rows.shape, dtype=rows.dtype, device=grad.device)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=grad.device)
    source = native_source(native.module.cuda, rows, index, flipped)
    gradient = native.module.cuda.Gradient(
        native.DTYPES[grad.dtype], grad.data_ptr(), grad.stride(0), length, width, source, out.data_ptr()
    )
    if row_gradients.mostly_once(index, flipped, count):
        used = torch.zeros(2, count, dtype=torch.int64, device=grad.device)
        native.module.cuda.template_concat_backward_mapped(gradient, used.data_ptr(), *native.launch(out))
        return out
    by_row = row_gradients.by_row(index, flipped, count)
    sums = row_gradients.room_for_sums(length, width, grad.device)
    native.module.cuda.template_concat_backward_sorted(
        gradient,
        by_row.rows.data_ptr(),
        by_row.rows.dtype == torch.int64,
        by_row.places.data_ptr(),
        by_row.starts.data_ptr(),
        sums.data_ptr(),
        *native.launch(out),
    )
    return out
