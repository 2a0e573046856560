"""Output head and cross-entropy in Triton: the kernels around the products of reca_kernels/chunked_head.py.

The buffer of logits has a pitch of whole 128 elements, so a row is whole units of 16 bytes; what the last unit holds
beyond the last class is left out in registers, not by a mask, and every access is 128 bits wide:

    row   |U U U U U U U U|U U U U U U U U| ... |z z x x x x x x|. . .          x: read, taken for -inf, written as 0
          class 0                                   V              pitch
"""

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels import chunked_head
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_cross_entropy.triton import (
    LAUNCH,
    capped,
    joined,
    log_of_sum,
    other_gradient,
    own_gradient,
    reduce,
    row_loss,
    switches,
)

__all__ = ["copy_rows", "forward", "pick_rows", "reduce", "row_gradients", "scale"]


@triton.jit
def pick_rows_kernel(labels, losses, rows, row_labels, scale, count, most, ignore_index, MEAN: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """One program: rows that carry a label move up, in order."""
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
def copy_rows_kernel(source, source_stride, source_rows, out, out_stride, out_rows, width, FROM: tl.constexpr,
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
def row_gradients_kernel(logits, pitch, bias, row_labels, rows, row_grad, scale, losses, dropped, classes, low, high,
                         smoothing, z_loss, softcap, BIAS: tl.constexpr, ROW_GRAD: tl.constexpr, GRADIENT: tl.constexpr,
                         DROP: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr, VEC: tl.constexpr,
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
    z_label = capped(z_label, softcap, CAP)
    pivot = tl.where(tl.abs(z_label) < float("inf"), z_label, 0.0)
    peak = tl.full([UNITS], -float("inf"), tl.float32)
    total = tl.zeros([UNITS], tl.float32)
    sum_z = tl.zeros([UNITS], tl.float32)
    for u in range(0, count, UNITS):
        here = (u + place < count)[:, None]
        z = tl.load(logits + u * VEC + element, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            z += tl.load(bias + u * VEC + element, mask=here, other=0.0).to(tl.float32)
        inside = u * VEC + element < classes
        z = tl.where(inside, capped(z, softcap, CAP), -float("inf"))
        if SMOOTH:
            sum_z += tl.sum(tl.where(inside, z - pivot, 0.0), 1)
        peak, total = joined(peak, total, z)
    m = tl.max(peak, 0)
    finite = tl.where(m == -float("inf"), 0.0, m)
    log_sum = log_of_sum(tl.sum(total.to(tl.float64) * tl.exp(peak - finite).to(tl.float64), 0))
    mean = tl.sum(sum_z.to(tl.float64), 0).to(tl.float32) / classes + (pivot - m)
    tl.store(losses + row, row_loss(z_label, m, log_sum, mean, smoothing, z_loss, SMOOTH))

    if GRADIENT:
        factor = tl.load(scale)
        if ROW_GRAD:
            factor *= tl.load(row_grad + row)
        # Without the factor, which scales what is written; `dropped` is that of the row's own loss.
        by_z_loss = 2 * z_loss * (m + log_sum)
        slope = 1 + by_z_loss
        level = smoothing / classes
        own = own_gradient(raw_label, m, log_sum, 1.0, by_z_loss, smoothing, level, softcap, CAP)
        left_out = tl.zeros([UNITS], tl.float32)
        for u in range(0, count, UNITS):
            here = (u + place < count)[:, None]
            column = u * VEC + element
            z = tl.load(logits + column, mask=here, other=0.0).to(tl.float32)
            if BIAS:
                z += tl.load(bias + column, mask=here, other=0.0).to(tl.float32)
            g = other_gradient(z, m, log_sum, slope, level, softcap, CAP)
            g = tl.where(column == label, own, g)
            g = tl.where(column < classes, g, 0.0)
            if DROP:
                left_out += tl.sum(tl.where((column < low) | (column >= high), tl.abs(g), 0.0), 1)
            g *= factor
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=here)
        if DROP:
            tl.store(dropped + row, tl.sum(left_out, 0))


@triton.jit
def scale_kernel(gradient, grad, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(grad).to(tl.float32)
    tl.store(out + at, g.to(out.dtype.element_ty), mask=at < count)


# ---- launchers, as reca_kernels/chunked_head.py states them ----


def pick_rows(
    labels: Tensor, ignore_index: int, mean: bool, losses: Tensor, rows: Tensor, row_labels: Tensor, scale: Tensor
) -> None:
    with torch.cuda.device_of(labels):
        pick_rows_kernel[1,](
            labels, losses, rows, row_labels, scale, len(labels), len(rows), ignore_index, MEAN=mean, BLOCK=2048,
            **LAUNCH,
        )  # fmt: skip


def copy_rows(source: Tensor, source_rows: Tensor | None, out: Tensor, out_rows: Tensor | None) -> None:
    count, width = len(source if source_rows is None else source_rows), source.shape[1]
    block = min(triton.next_power_of_2(width), 2048)
    if count and width:
        with torch.cuda.device_of(source):
            copy_rows_kernel[count, triton.cdiv(width, block)](
                source, source.stride(0), source_rows, out, out.stride(0), out_rows, width,
                FROM=source_rows is not None, TO=out_rows is not None, BLOCK=block, **LAUNCH,
            )  # fmt: skip


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
    low, high = window or (0, classes)
    with torch.cuda.device_of(logits):
        row_gradients_kernel[len(logits),](
            logits, logits.stride(0), bias, row_labels, rows, row_grad, scale, losses, dropped, classes, low, high,
            options.label_smoothing, options.z_loss, options.softcap or 0.0, BIAS=bias is not None,
            ROW_GRAD=row_grad is not None, GRADIENT=window is not None, DROP=dropped is not None and window is not None,
            SMOOTH=options.label_smoothing != 0, **switches(logits, options),
        )  # fmt: skip


def scale(gradient: Tensor, grad: Tensor) -> Tensor:  # grad fp32 []
    """The product in fp32, rounded once. A copy always: whether grad is 1 only the GPU knows."""
    out = torch.empty_like(gradient)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            scale_kernel[triton.cdiv(gradient.numel(), 4096),](
                gradient, grad, out, gradient.numel(), BLOCK=4096, **LAUNCH
            )
    return out


def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    return chunked_head.forward(sys.modules[__name__], *arguments)
