"""Gather, add and concatenate rows, with gradients, in Triton. See docs/kernels/template_concat.md for figures.

One program writes one tile of columns of one row. Accesses are 16 bytes wide if the addresses, the row strides and the
width are multiples of 16, and narrower otherwise.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels.template_concat import row_gradients

CHUNK = tl.constexpr(row_gradients.CHUNK)
UNROLL = tl.constexpr(4)  # loads in flight per sum


@triton.jit
def forward_kernel(
    out,  # [T, D]
    sources,  # per source (rows [K, D], its row stride, K, index [T]); the table and the visual rows share an index
    width,
    block: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    table, table_stride, table_count, src = sources[0]
    visual, visual_stride, visual_count, _ = sources[1]
    row = tl.load(src + t).to(tl.int64)
    visual_row = -1 - row
    there = (row < table_count) & (visual_row < visual_count)
    word = tl.load(table + row * table_stride + columns, mask=columns < tl.where((row >= 0) & there, width, 0), other=0)
    image = tl.load(
        visual + visual_row * visual_stride + columns, mask=columns < tl.where((row < 0) & there, width, 0), other=0
    )
    if word.dtype == image.dtype:
        x = tl.where(row >= 0, word, image)
    else:
        x = tl.where(row >= 0, word.to(tl.float32), image.to(tl.float32))
    if len(sources) > 2:
        x = x.to(tl.float32)
    for i in tl.static_range(2, len(sources)):
        rows, stride, count, index = sources[i]
        row = tl.load(index + t).to(tl.int64)
        there = there & (row < count)
        used = (row >= 0) & (row < count)
        added = tl.load(rows + row * stride + columns, mask=columns < tl.where(used, width, 0), other=0)
        x = tl.where(used, x + added.to(tl.float32), x)
    x = tl.where(there, x, tl.cast(float("nan"), x.dtype))  # Triton's interpreter up to 3.8 has no bf16 constants
    tl.store(out + t * width + columns, x.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _sum_places(grad, grad_stride, places, begin, end, columns, width):
    """Sum the gradient's rows places[begin:end] in order; 0 if there are none."""
    place = tl.load(places + begin, mask=begin < end, other=0)
    x = tl.load(grad + place * grad_stride + columns, mask=columns < tl.where(begin < end, width, 0), other=0)
    x = x.to(tl.float32)
    for i in range(begin + 1, end, UNROLL):
        for u in tl.static_range(UNROLL):
            there = i + u < end
            place = tl.load(places + i + u, mask=there, other=0)
            added = tl.load(grad + place * grad_stride + columns, mask=columns < tl.where(there, width, 0), other=0)
            x = tl.where(there, x + added.to(tl.float32), x)
    return x


@triton.jit
def chunks_kernel(
    sums,  # [2 * windows, D] fp32
    grad,  # [T, D]
    grad_stride,
    rows,  # [T], ascending
    places,  # [T] int64
    starts,  # [K + 1] int64
    length,
    count,
    width,
    block: tl.constexpr,
):
    """Sum the chunks of rows that have more than one chunk.

    A chunk is stored by the window of CHUNK sorted positions in which it begins. Two chunks can begin in one window,
    the last of a row and the first of the next: slot 1 is for the first chunk of a row, slot 0 for a later one.
    """
    slot = tl.program_id(0).to(tl.int64)
    first = slot % 2 == 1
    low = slot // 2 * CHUNK
    high = tl.minimum(low + CHUNK, length)
    row = tl.load(rows + tl.where(first, high - 1, low)).to(tl.int64)
    known = (row >= 0) & (row < count)
    start = tl.load(starts + row, mask=known, other=0)
    end = tl.load(starts + row + 1, mask=known, other=0)
    begin = tl.where(first, start, start + tl.cdiv(low - start, CHUNK) * CHUNK)
    if (end - start > CHUNK) & (begin >= low) & (begin < tl.minimum(high, end)) & (first == (begin == start)):
        columns = tl.program_id(1) * block + tl.arange(0, block)
        x = _sum_places(grad, grad_stride, places, begin, tl.minimum(begin + CHUNK, end), columns, width)
        tl.store(sums + slot * width + columns, x, mask=columns < width)


@triton.jit
def rows_kernel(
    gradient,  # [K, D]
    grad,  # [T, D]
    grad_stride,
    places,  # [T] int64
    starts,  # [K + 1] int64
    sums,  # as chunks_kernel leaves them
    width,
    block: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    start, end = tl.load(starts + k), tl.load(starts + k + 1)
    if end - start <= CHUNK:
        x = _sum_places(grad, grad_stride, places, start, end, columns, width)
    else:
        x = tl.load(sums + (start // CHUNK * 2 + 1) * width + columns, mask=inside, other=0)
        for begin in range(start + CHUNK, end, CHUNK * UNROLL):
            for u in tl.static_range(UNROLL):
                there = begin + u * CHUNK < end
                slot = (begin // CHUNK + u) * 2
                added = tl.load(sums + slot * width + columns, mask=columns < tl.where(there, width, 0), other=0)
                x = tl.where(there, x + added, x)
    tl.store(gradient + k * width + columns, x.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def map_kernel(
    used,  # [2, K] int64, initially 0: T minus the first position of a row, and 1 plus the last
    index,  # [T]
    length,
    count,
    negated: tl.constexpr,
    block: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    row = tl.load(index + t, mask=t < length, other=0).to(tl.int64)
    row = -1 - row if negated else row
    known = (t < length) & (row >= 0) & (row < count)
    tl.atomic_max(used + row, length - t, mask=known, sem="relaxed")
    tl.atomic_max(used + count + row, t + 1, mask=known, sem="relaxed")


@triton.jit
def mapped_kernel(
    gradient,  # [K, D]
    grad,  # [T, D]
    grad_stride,
    used,  # [2, K] int64, as map_kernel leaves it
    index,  # [T]
    length,
    count,
    width,
    negated: tl.constexpr,
    block: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    first = length - tl.load(used + k)
    end = tl.load(used + count + k)
    x = tl.load(grad + first * grad_stride + columns, mask=columns < tl.where(end > 0, width, 0), other=0)
    x = x.to(tl.float32)
    if end > first + 1:  # rare: a row used more than once; search for its other positions
        total = x
        seen = 1
        for t in range(first + 1, end):
            row = tl.load(index + t).to(tl.int64)
            if (-1 - row if negated else row) == k:
                added = tl.load(grad + t * grad_stride + columns, mask=inside, other=0).to(tl.float32)
                if seen % CHUNK == 0:
                    total = tl.where(seen > CHUNK, total + x, x)
                    x = added
                else:
                    x = x + added
                seen += 1
        x = tl.where(seen > CHUNK, total + x, x)
    tl.store(gradient + k * width + columns, x.to(gradient.dtype.element_ty), mask=inside)


def _tiles(width: int) -> tuple[int, int, int]:
    """Return tiles per row, columns per tile, and warps."""
    block = min(triton.next_power_of_2(width), 2048)
    return triton.cdiv(width, block), block, max(1, min(8, block // 256))


def forward(
    sources: Sequence[tuple[Tensor, Tensor, bool]],  # rows [K, D], index [T], negated
    out_dtype: torch.dtype,
) -> Tensor:  # [T, D]
    (table, src, _), *_ = sources
    out = torch.empty(src.shape[0], table.shape[1], dtype=out_dtype, device=table.device)
    if out.numel() == 0:
        return out
    tiles, block, warps = _tiles(out.shape[1])
    packed = tuple((rows, rows.stride(0), rows.shape[0], index) for rows, index, _ in sources)
    with torch.cuda.device_of(out):
        forward_kernel[(out.shape[0], tiles)](out, packed, out.shape[1], block=block, num_warps=warps)
    return out


def backward(
    grad: Tensor,  # [T, D]
    index: Tensor,  # [T]
    negated: bool,
    count: int,
    dtype: torch.dtype,
) -> Tensor:  # [count, D]
    length, width = grad.shape
    if 0 in (length, width, count):
        return torch.zeros(count, width, dtype=dtype, device=grad.device)
    gradient = torch.empty(count, width, dtype=dtype, device=grad.device)
    tiles, block, warps = _tiles(width)
    reads = grad, grad.stride(0)
    with torch.cuda.device_of(grad):
        if row_gradients.mostly_once(index, negated, count):
            used = torch.zeros(2, count, dtype=torch.int64, device=grad.device)
            map_kernel[(triton.cdiv(length, 256),)](used, index, length, count, negated, block=256)
            mapped_kernel[(count, tiles)](
                gradient, *reads, used, index, length, count, width, negated, block=block, num_warps=warps
            )
            return gradient
        sorted_rows, places, starts = row_gradients.by_row(index, negated, count)
        sums = row_gradients.workspace(length, width, grad.device)
        if len(sums) > 0:
            chunks_kernel[(len(sums), tiles)](
                sums, *reads, sorted_rows, places, starts, length, count, width, block=block, num_warps=warps
            )
        rows_kernel[(count, tiles)](gradient, *reads, places, starts, sums, width, block=block, num_warps=warps)
    return gradient
