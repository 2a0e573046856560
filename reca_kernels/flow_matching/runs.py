"""Runs of images of one size that are contiguous in memory; a kernel processes a run as one batch."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ImageRun(NamedTuple):
    address: int  # of the first image
    images: int
    height: int
    width: int


def image_count(batches: Sequence[Tensor]) -> int:
    """Return the number of images of batches [n, C, H, W]."""
    return sum(batch.shape[0] for batch in batches)


def image_runs(batches: Sequence[Tensor]) -> list[ImageRun]:
    """Return the runs in a list of contiguous batches [n, C, H, W] of one dtype, in order."""
    found: list[ImageRun] = []
    start, end, count = batches[0].data_ptr(), batches[0].data_ptr(), 0
    shape = batches[0].shape[1:]
    for batch in batches:
        address = batch.data_ptr()
        if address != end or batch.shape[1:] != shape:
            found.append(ImageRun(start, count, *shape[1:]))
            start, shape, count = address, batch.shape[1:], 0
        end, count = address + batch.nbytes, count + batch.shape[0]
    return [*found, ImageRun(start, count, *shape[1:])]
