"""Output head and cross-entropy in C++ and CUDA (csrc/masked_linear_cross_entropy): implements kernels.Kernels."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.masked_cross_entropy.native import arguments, reduce
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_linear_cross_entropy.kernels import LabelledRows
from reca_kernels.masked_linear_cross_entropy.linear_chunks import empty_labelled_rows

__all__ = ["compact_labelled_rows", "gather_scatter_rows", "reduce", "row_gradients", "scale"]


def compact_labelled_rows(labels: Tensor, options: CrossEntropyOptions, max_labelled: int | None) -> LabelledRows:
    launch, mean = native.launch(labels), options.reduction == "mean"
    if launch.on_host:  # counting needs no synchronisation here
        rows = (labels != options.ignore_index).nonzero()[:, 0]
        scale = torch.tensor(1 / max(len(rows), 1) if mean else 1.0, dtype=torch.float32)
        return LabelledRows(rows, labels[rows], torch.zeros(len(labels), dtype=torch.float32), scale)
    found = empty_labelled_rows(labels, options.ignore_index, max_labelled)
    native.kernels().compact_labelled_rows(
        labels.data_ptr(),
        labels.dtype == torch.int64,
        len(labels),
        options.ignore_index,
        mean,
        len(found.rows),
        found.losses.data_ptr(),
        found.rows.data_ptr(),
        found.labels.data_ptr(),
        found.scale.data_ptr(),
        launch,
    )
    return found


def gather_scatter_rows(source: Tensor, source_rows: Tensor | None, out: Tensor, out_rows: Tensor | None) -> None:
    launch = native.launch(source)
    if launch.on_host:
        if source_rows is not None:
            torch.index_select(source, 0, source_rows, out=out)
        elif out_rows is not None:
            out.index_copy_(0, out_rows, source.to(out.dtype))
        return
    native.kernels().gather_scatter_rows(
        native.DTYPES[source.dtype],
        source.data_ptr(),
        source.stride(0),
        native.address(source_rows),
        native.DTYPES[out.dtype],
        out.data_ptr(),
        out.stride(0),
        native.address(out_rows),
        len(source if source_rows is None else source_rows),
        source.shape[1],
        launch,
    )


def row_gradients(
    logits: Tensor,  # [n, V]
    bias: Tensor | None,  # [pitch]
    labels: Tensor,  # [n]
    rows: Tensor,  # [n]
    row_grad: Tensor | None,  # [N]
    scale: Tensor,  # []
    options: CrossEntropyOptions,
    losses: Tensor,  # [N]
    gradient: bool,
) -> None:
    native.kernels().row_gradients(
        arguments(logits, labels, options),
        rows.data_ptr(),
        native.address(bias),
        native.address(row_grad),
        scale.data_ptr(),
        losses.data_ptr(),
        gradient,
        native.launch(logits),
    )


def scale(gradient: Tensor, grad: Tensor, out: Tensor) -> None:  # gradient and out contiguous, grad fp32 []
    launch = native.launch(gradient)
    if launch.on_host:
        factor = grad.item()
        if out is not gradient or factor != 1:
            torch.mul(gradient, factor, out=out)
        return
    native.kernels().scale(
        native.DTYPES[gradient.dtype],
        gradient.data_ptr(),
        grad.data_ptr(),
        out.data_ptr(),
        gradient.numel(),
        launch,
    )
