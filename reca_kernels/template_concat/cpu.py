"""Gather, add and concatenate rows on CPUs: csrc/cpu/template_concat.cpp."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from reca_kernels import native


def native_source(module: ModuleType, rows: Tensor, index: Tensor, flipped: bool) -> object:
    """The source for the launchers of `module`, which keeps no tensor alive."""
    return module.Source(
        native.DTYPES[rows.dtype],
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        index.data_ptr(),
        index.dtype == torch.int64,
        flipped,
    )


def forward(
    sources: Sequence[tuple[Tensor, Tensor, bool]],  # rows [K, D], index [T], flipped
    out_dtype: torch.dtype,
) -> Tensor:  # [T, D]
    length, width = sources[0][1].shape[0], sources[0][0].shape[1]
    native_sources = [native_source(native.module, *source) for source in sources]
    if (bad := native.module.template_concat_check(native_sources, length)) >= 0:
        position, number = divmod(bad, len(sources))
        raise ValueError(
            f"template_concat: position {position} asks for row {_row(sources[number], position)} of "
            f"{('table', 'visual', *(f'adds[{i}]' for i in range(len(sources) - 2)))[number]}, "
            f"which has {sources[number][0].shape[0]} rows"
        )
    out = torch.empty(length, width, dtype=out_dtype, device=sources[0][0].device)
    native.module.template_concat_forward(
        native_sources, length, width, native.DTYPES[out_dtype], out.data_ptr(), torch.get_num_threads()
    )
    return out


def _row(source: tuple[Tensor, Tensor, bool], position: int) -> int:
    _, index, flipped = source
    value = int(index[position])
    return -1 - value if flipped else value


def backward(
    grad: Tensor,  # [T, D]
    index: Tensor,  # [T]
    flipped: bool,
    rows: Tensor,  # [K, D], only its shape and dtype count
) -> Tensor:  # [K, D]
    length, width = grad.shape
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    workspace = torch.empty(rows.shape[0] + 1 + length, dtype=torch.int64, device=rows.device)
    native.module.template_concat_backward(
        native.DTYPES[grad.dtype],
        grad.data_ptr(),
        grad.stride(0),
        length,
        width,
        native_source(native.module, rows, index, flipped),
        out.data_ptr(),
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return out
