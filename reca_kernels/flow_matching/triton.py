"""Flow matching in Triton: a program handles 2048 consecutive elements of one image, in the order of the prediction.

The locations of the images are a tuple of integers among a kernel's arguments, so a list of images needs one launch (up
to RUNS runs of equal images) and can be captured in a CUDA graph. For the loss each program writes one partial sum; a
second kernel adds the partial sums of an image in a fixed order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels.flow_matching.runs import image_count, image_runs
from reca_kernels.philox.address import Philox, flattened
from reca_kernels.philox.triton import FUSE, normals

BLOCK = 2048
RUNS = 8  # most runs per launch; kernels are compiled for 1 and for RUNS
FIELDS = 7
# Triton specialises on integers that are 1, divisible by 16, or wider than 32 bits, and recompiles. A table stores n as
# CODE + 2 n, which is never 1 or divisible by 16 and always wider than 32 bits.
CODE = tl.constexpr(2**62 + 1)


@triton.jit
def _number(table, i: tl.constexpr):
    return (table[i] - CODE) >> 1


@triton.jit
def _run(table, r: tl.constexpr):
    first, programs = _number(table, 7 * r + 3).to(tl.int32), _number(table, 7 * r + 4).to(tl.int32)
    image, width = _number(table, 7 * r + 5).to(tl.int32), _number(table, 7 * r + 6).to(tl.int32)
    return _number(table, 7 * r), _number(table, 7 * r + 1), _number(table, 7 * r + 2), first, programs, image, width


@triton.jit
def _find(table, number, KEY: tl.constexpr, RUNS: tl.constexpr):
    """Return the last run whose field KEY is at most `number`; KEY ascends over the runs.

    The fields are: offset in x0, elements per image, offset of its first image in the prediction, first program,
    programs per image, first image, width.
    """
    x0, elements, offset, first, programs, image, width = _run(table, 0)
    for r in tl.static_range(1, RUNS):
        next_x0, next_elements, next_offset, next_first, next_programs, next_image, next_width = _run(table, r)
        later = number >= (next_first if KEY == 3 else next_image)
        x0 = tl.where(later, next_x0, x0)
        elements = tl.where(later, next_elements, elements)
        offset = tl.where(later, next_offset, offset)
        first = tl.where(later, next_first, first)
        programs = tl.where(later, next_programs, programs)
        image = tl.where(later, next_image, image)
        width = tl.where(later, next_width, width)
    return x0, elements, offset, first, programs, image, width


@triton.jit
def _elements(images, table, seed, ids, stream, explicit, EXPLICIT: tl.constexpr, PATCH: tl.constexpr,
              CHANNELS: tl.constexpr, EIGHTS: tl.constexpr, BIG: tl.constexpr, RUNS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Return this program's x0, noise, offset in the prediction, mask of valid elements, and image index."""
    program = tl.program_id(0)
    x0, elements, offset, first, programs, image, width = _find(table, program, 3, RUNS)
    number = (program - first) // programs
    begin = ((program - first) % programs).to(tl.int64) * BLOCK
    x0 += number.to(tl.int64) * elements
    offset += number.to(tl.int64) * elements
    image += number
    if EIGHTS:  # these three are multiples of 8, and addresses of 16; Triton 3.6 loses tl.multiple_of hints here
        x0, elements, offset = x0 // 8 * 8, elements // 8 * 8, offset // 8 * 8
    i = tl.arange(0, BLOCK)
    here = i < tl.minimum(elements - begin, BLOCK).to(tl.int32)
    if PATCH == 1:
        source = images + (x0 + begin) + i
    else:  # patches in row-major order, inside a patch (row, column, channel)
        e = i + (begin if BIG else begin.to(tl.int32))
        plane = elements // CHANNELS
        pixel = e // CHANNELS
        token, inner = pixel // (PATCH * PATCH), pixel % (PATCH * PATCH)
        columns = width // PATCH
        row = token // columns * PATCH + inner // PATCH
        column = token % columns * PATCH + inner % PATCH
        source = images + x0 + (e % CHANNELS).to(tl.int64) * plane + (row * width + column)
    clean = tl.load(source, mask=here, other=0.0).to(tl.float32)
    place = offset + begin
    if EXPLICIT:
        noise = tl.load(explicit + place + i, mask=here, other=0.0).to(tl.float32)
    else:
        sample = tl.load(ids + image)
        noise = normals(tl.load(seed), sample, stream, begin // 4 + tl.arange(0, BLOCK // 4))
    return clean, noise, place, here, image


@triton.jit(do_not_specialize=["stream"])
def add_noise_kernel(images, table, seed, ids, stream, explicit, t, x_t, EXPLICIT: tl.constexpr, PATCH: tl.constexpr,
                   CHANNELS: tl.constexpr, EIGHTS: tl.constexpr, BIG: tl.constexpr, RUNS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    clean, noise, place, here, image = _elements(
        images, table, seed, ids, stream, explicit, EXPLICIT, PATCH, CHANNELS, EIGHTS, BIG, RUNS, BLOCK
    )
    level = tl.load(t + image)
    mixed = (1.0 - level) * clean + level * noise
    tl.store(x_t + place + tl.arange(0, BLOCK), mixed.to(x_t.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["stream"])
def loss_kernel(images, table, seed, ids, stream, explicit, pred, gradient, partial, EXPLICIT: tl.constexpr,
                PATCH: tl.constexpr, CHANNELS: tl.constexpr, EIGHTS: tl.constexpr, BIG: tl.constexpr,
                RUNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    clean, noise, place, here, _ = _elements(
        images, table, seed, ids, stream, explicit, EXPLICIT, PATCH, CHANNELS, EIGHTS, BIG, RUNS, BLOCK
    )
    guess = tl.load(pred + place + tl.arange(0, BLOCK), mask=here, other=0.0).to(tl.float32)
    error = tl.where(here, guess - (noise - clean), 0.0)
    if gradient is not None:
        tl.store(gradient + place + tl.arange(0, BLOCK), (error + error).to(pred.dtype.element_ty), mask=here)
    tl.store(partial + tl.program_id(0), tl.sum(error * error, 0))


@triton.jit(do_not_specialize=["start"])
def total_kernel(table, start, partial, losses, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    image = start + tl.program_id(0)
    _, elements, _, first, programs, first_image, _ = _find(table, image, 5, RUNS)
    count = tl.where(elements == 0, 0, programs)
    partial += first + (image - first_image).to(tl.int64) * programs
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        total += tl.load(partial + begin + i, mask=begin + i < count, other=0.0).to(tl.float64)
    tl.store(losses + image, tl.sum(total, 0).to(tl.float32))


# ---- launchers ----


def add_noise(batches: list[Tensor], t: Tensor, noise: Philox | Tensor, patch: int, out: Tensor) -> None:
    seed, ids, stream, explicit = flattened(noise)
    with torch.cuda.device_of(out):
        for table, programs, _, _, compiled in _launches(batches, explicit, patch, (out,)):
            if programs:
                add_noise_kernel[programs,](batches[0], table, seed, ids, stream, explicit, t, out, **compiled, **FUSE)


def losses(pred: Tensor, batches: list[Tensor], noise: Philox | Tensor, patch: int, gradient: Tensor | None) -> Tensor:
    seed, ids, stream, explicit = flattened(noise)
    images = image_count(batches)
    sums = torch.empty(images, dtype=torch.float32, device=pred.device)
    partial = torch.empty(pred.numel() // BLOCK + images, dtype=torch.float32, device=pred.device)
    done = 0
    with torch.cuda.device_of(pred):
        for table, programs, start, count, compiled in _launches(batches, explicit, patch, (pred, gradient)):
            here = partial[done:]
            if programs:
                loss_kernel[programs,](
                    batches[0], table, seed, ids, stream, explicit, pred, gradient, here, **compiled, **FUSE
                )
            if count:
                total_kernel[count,](table, start, here, sums, RUNS=compiled["RUNS"], BLOCK=1024)
            done += programs
    return sums


class _Launch(NamedTuple):
    table: tuple[int, ...]
    programs: int
    first_image: int
    images: int
    compiled: dict[str, Any]


def _launches(
    batches: list[Tensor], explicit: Tensor | None, patch: int, tensors: tuple[Tensor | None, ...]
) -> Iterator[_Launch]:
    """Yield one launch for every RUNS runs."""
    found = image_runs(batches)
    bytes_each, base = batches[0].element_size(), batches[0].data_ptr()
    channels = batches[0].shape[1]
    sizes = [channels * height * width for _, _, height, width in found]
    beginnings = [t.data_ptr() for t in (*tensors, explicit) if t is not None]
    compiled = {
        "EXPLICIT": explicit is not None,
        "PATCH": patch,
        "CHANNELS": channels if patch > 1 else 1,
        "EIGHTS": all(n % 8 == 0 for n in sizes)
        and all(a % 16 == 0 for a in (*beginnings, base))
        and all((r[0] - base) % (8 * bytes_each) == 0 for r in found),
        "BIG": max(sizes) >= 2**31,
        "RUNS": 1 if len(found) == 1 else RUNS,
        "BLOCK": BLOCK,
        "num_warps": 8,
    }
    offset = image = 0
    for begin in range(0, len(found), RUNS):
        table: list[int] = []
        program, start, end = 0, image, begin + RUNS
        for (address, count, _, width), size in zip(found[begin:end], sizes[begin:end], strict=True):
            each = triton.cdiv(size, BLOCK)
            table += ((address - base) // bytes_each, size, offset, program, max(each, 1), image, width)
            offset, program, image = offset + count * size, program + count * each, image + count
        table += [2**31 - 1] * (compiled["RUNS"] * FIELDS - len(table))  # padding that no program selects
        yield _Launch(tuple(CODE.value + 2 * n for n in table), program, start, image - start, compiled)
