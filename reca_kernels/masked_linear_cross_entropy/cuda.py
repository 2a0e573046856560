"""Output head and cross-entropy on CUDA devices: csrc/cuda/masked_linear_cross_entropy.cu around torch's products."""

import sys
from typing import Any

import torch
from torch import Tensor

from reca_kernels import chunked_head, native
from reca_kernels.masked_cross_entropy.cuda import arguments, reduce
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions

__all__ = ["copy_rows", "forward", "pick_rows", "reduce", "row_gradients", "scale"]


def forward(*args: Any) -> tuple[Tensor | None, ...]:
    return chunked_head.forward(sys.modules[__name__], *args)


def pick_rows(
    labels: Tensor, ignore_index: int, mean: bool, losses: Tensor, rows: Tensor, row_labels: Tensor, scale: Tensor
) -> None:
    native.module.cuda.pick_rows(
        labels.data_ptr(),
        labels.dtype == torch.int64,
        len(labels),
        ignore_index,
        mean,
        len(rows),
        losses.data_ptr(),
        rows.data_ptr(),
        row_labels.data_ptr(),
        scale.data_ptr(),
        *native.launch(labels),
    )


def copy_rows(source: Tensor, source_rows: Tensor | None, out: Tensor, out_rows: Tensor | None) -> None:
    if source.stride(1) != 1:
        source = source.contiguous()
    native.module.cuda.copy_rows(
        native.DTYPES[source.dtype],
        source.data_ptr(),
        source.stride(0),
        address(source_rows),
        native.DTYPES[out.dtype],
        out.data_ptr(),
        out.stride(0),
        address(out_rows),
        len(source if source_rows is None else source_rows),
        source.shape[1],
        *native.launch(source),
    )


def row_gradients(
    logits: Tensor,  # [n, pitch]
    bias: Tensor | None,  # [pitch]
    row_labels: Tensor,  # [n]
    rows: Tensor,  # [n]
    row_grad: Tensor | None,  # [N]
    scale: Tensor,  # []
    options: CrossEntropyOptions,
    losses: Tensor,  # [N]
    window: tuple[int, int] | None,
    dropped: Tensor | None,  # [N]
    classes: int,
) -> None:
    native.module.cuda.masked_linear_cross_entropy_rows(
        arguments(logits[:, :classes], row_labels, options),
        rows.data_ptr(),
        address(bias),
        address(row_grad),
        scale.data_ptr(),
        losses.data_ptr(),
        0 if window is None else address(dropped),
        window is not None,
        *(window or (0, classes)),
        *native.launch(logits),
    )


def scale(gradient: Tensor, grad: Tensor) -> Tensor:  # grad fp32 []
    """The product in fp32, rounded once. A copy always: whether grad is 1 only the GPU knows."""
    gradient, grad = gradient.contiguous(), grad.float()
    out = torch.empty_like(gradient)
    native.module.cuda.scale(
        native.DTYPES[gradient.dtype],
        gradient.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        gradient.numel(),
        *native.launch(gradient),
    )
    return out


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
