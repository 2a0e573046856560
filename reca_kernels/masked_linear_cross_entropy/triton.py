"""Output head and cross-entropy in Triton: the kernels between the matmuls of linear_chunks.py.

The row stride of the logits buffer is a multiple of 128 elements, so a row consists of whole 16-byte units. Elements of
the last unit beyond the last class are discarded in registers, not by a mask, so every access is 128 bits wide:

    row   |U U U U U U U U|U U U U U U U U| ... |z z x x x x x x|. . .          x: read as -inf, written as 0
          class 0                                   V              pitch
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_cross_entropy.triton import (
    LAUNCH,
    SUM_SCALE,
    log_of_sum,
    non_target_grad,
    online_softmax_update,
    reduce,
    row_loss,
    softcap_logits,
    switches,
    target_grad,
)
from reca_kernels.masked_linear_cross_entropy.kernels import LabelledRows
from reca_kernels.masked_linear_cross_entropy.linear_chunks import empty_labelled_rows

__all__ = ["compact_labelled_rows", "gather_scatter_rows", "reduce", "row_gradients", "scale"]


@triton.jit
def compact_labelled_rows_kernel(labels, losses, rows, row_labels, scale, count, most, ignore_index, MEAN: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Compact the rows that carry a label, in order, in one program."""
    at = tl.arange(0, BLOCK)
    found = 0
    for begin in range(0, count, BLOCK):
        here = at < count - begin
        label = tl.load(labels + begin + at, mask=here, other=0).to(tl.int64)
        keep = (here & (label != ignore_index)).to(tl.int32)
        place = found + tl.cumsum(keep, 0) - 1
        fits = (keep != 0) & (place < most)
        tl.store(rows + place, (begin + at).to(tl.int64), mask=fits)
        tl.store(row_labels + place, label, mask=fits)
        tl.store(losses + begin + at, tl.where((keep != 0) & (place >= most), float("nan"), 0.0), mask=here)
        found += tl.sum(keep, 0)
    for begin in range(found, most, BLOCK):
        here = at < most - begin
        tl.store(rows + begin + at, tl.full([BLOCK], -1, tl.int64), mask=here)
        tl.store(row_labels + begin + at, tl.zeros([BLOCK], tl.int64) + ignore_index, mask=here)
    value = 1.0
    if MEAN:
        value = (1.0 / tl.maximum(found, 1).to(tl.float64)).to(tl.float32)
    tl.store(scale, value)


@triton.jit
def gather_scatter_rows_kernel(source, source_stride, source_rows, out, out_stride, out_rows, width, FROM: tl.constexpr,
                     TO: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    taken = row
    if FROM:
        taken = tl.load(source_rows + row)
    put = row
    if TO:
        put = tl.load(out_rows + row)
    if put < 0:
        return
    there = column < tl.where(taken < 0, 0, width)
    x = tl.load(source + taken * source_stride + column, mask=there, other=0.0)
    tl.store(out + put * out_stride + column, x.to(out.dtype.element_ty), mask=here)


@triton.jit
def row_gradients_kernel(logits, pitch, bias, row_labels, rows, row_grad, scale, losses, classes, smoothing, z_loss,
                         softcap, BIAS: tl.constexpr, ROW_GRAD: tl.constexpr, GRADIENT: tl.constexpr,
                         SMOOTH: tl.constexpr, CAP: tl.constexpr, VEC: tl.constexpr,
                         UNITS: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + n)
    label = tl.load(row_labels + n)
    logits += n * pitch // VEC * VEC
    place = tl.arange(0, UNITS)
    element = place[:, None] * VEC + tl.arange(0, VEC)[None, :]
    count = (classes + VEC - 1) // VEC
    if (row < 0) | (label < 0) | (label >= classes):
        if row >= 0:
            tl.store(losses + row, float("nan"))
        if GRADIENT:
            zeros = tl.zeros([UNITS, VEC], tl.float32).to(logits.dtype.element_ty)
            for u in range(0, count, UNITS):
                tl.store(logits + u * VEC + element, zeros, mask=(u + place < count)[:, None])
        return

    z_label = tl.load(logits + label).to(tl.float32)
    if BIAS:
        z_label += tl.load(bias + label).to(tl.float32)
    raw_label = z_label
    z_label = softcap_logits(z_label, softcap, CAP)
    pivot = tl.where(tl.abs(z_label) < float("inf"), z_label, 0.0)
    row_max = tl.full([UNITS], -float("inf"), tl.float32)
    total = tl.zeros([UNITS], tl.float32)
    sum_z = tl.zeros([UNITS], tl.float32)
    for u in range(0, count, UNITS):
        here = (u + place < count)[:, None]
        z = tl.load(logits + u * VEC + element, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            z += tl.load(bias + u * VEC + element, mask=here, other=0.0).to(tl.float32)
        inside = u * VEC + element < classes
        z = tl.where(inside, softcap_logits(z, softcap, CAP), -float("inf"))
        if SMOOTH:
            sum_z += tl.sum(tl.where(inside, z * SUM_SCALE - pivot * SUM_SCALE, 0.0), 1)
        row_max, total = online_softmax_update(row_max, total, z)
    m = tl.max(row_max, 0)
    finite = tl.where(m == -float("inf"), 0.0, m)
    log_sum_exp = log_of_sum(tl.sum(total.to(tl.float64) * tl.exp(row_max - finite).to(tl.float64), 0))
    mean = tl.sum(sum_z.to(tl.float64), 0) / SUM_SCALE / classes + (pivot.to(tl.float64) - m.to(tl.float64))
    tl.store(losses + row, row_loss(z_label, m, log_sum_exp, mean, smoothing, z_loss, SMOOTH))

    if GRADIENT:
        factor = tl.load(scale)
        if ROW_GRAD:
            factor *= tl.load(row_grad + row)
        by_z_loss = 2 * z_loss * (m + log_sum_exp)
        slope = factor * (1 + by_z_loss)
        level = factor * smoothing / classes
        target = target_grad(raw_label, m, log_sum_exp, factor, by_z_loss, smoothing, level, softcap, CAP)
        for u in range(0, count, UNITS):
            here = (u + place < count)[:, None]
            column = u * VEC + element
            z = tl.load(logits + column, mask=here, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
            g = non_target_grad(z, m, log_sum_exp, slope, level, softcap, CAP)
            g = tl.where(column == label, target, g)
            g = tl.where(column < classes, g, 0.0)
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=here)


@triton.jit
def scale_kernel(gradient, grad, out, count, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(grad)
    if IN_PLACE and factor == 1.0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32) * factor
    tl.store(out + at, g.to(out.dtype.element_ty), mask=at < count)


# ---- launchers, implementing kernels.Kernels ----


def compact_labelled_rows(labels: Tensor, options: CrossEntropyOptions, max_labelled: int | None) -> LabelledRows:
    found = empty_labelled_rows(labels, options.ignore_index, max_labelled)
    with torch.cuda.device_of(labels):
        compact_labelled_rows_kernel[1,](
            labels, found.losses, found.rows, found.labels, found.scale, len(labels), len(found.rows),
            options.ignore_index, MEAN=options.reduction == "mean", BLOCK=2048, **LAUNCH,
        )  # fmt: skip
    return found


def gather_scatter_rows(source: Tensor, source_rows: Tensor | None, out: Tensor, out_rows: Tensor | None) -> None:
    count, width = len(source if source_rows is None else source_rows), source.shape[1]
    block = min(triton.next_power_of_2(width), 2048)
    if count and width:
        with torch.cuda.device_of(source):
            gather_scatter_rows_kernel[count, triton.cdiv(width, block)](
                source, source.stride(0), source_rows, out, out.stride(0), out_rows, width,
                FROM=source_rows is not None, TO=out_rows is not None, BLOCK=block, **LAUNCH,
            )  # fmt: skip


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
    with torch.cuda.device_of(logits):
        row_gradients_kernel[len(logits),](
            logits, logits.stride(0), bias, labels, rows, row_grad, scale, losses, logits.shape[1],
            options.label_smoothing, options.z_loss, options.softcap or 0.0, BIAS=bias is not None,
            ROW_GRAD=row_grad is not None, GRADIENT=gradient, SMOOTH=options.label_smoothing != 0,
            **switches(logits, options),
        )  # fmt: skip


def scale(gradient: Tensor, grad: Tensor, out: Tensor) -> None:  # gradient and out contiguous, grad fp32 []
    if gradient.numel():
        in_place = out.data_ptr() == gradient.data_ptr()
        with torch.cuda.device_of(gradient):
            scale_kernel[triton.cdiv(gradient.numel(), 4096),](
                gradient, grad, out, gradient.numel(), IN_PLACE=in_place, BLOCK=4096, **LAUNCH
            )
