"""Images of one size that lie one after another in memory, which kernels take as one."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ImageRun(NamedTuple):
    address: int  # of the first
    images: int
    height: int
    width: int


def image_runs(images: Sequence[Tensor]) -> list[ImageRun]:
    """Return the runs of contiguous images [C, H, W] of one dtype, in order. A batch is one run."""
    found: list[ImageRun] = []
    start = images[0].data_ptr()
    shape, bytes_each, count = images[0].shape, images[0].nbytes, 0
    for image in images:
        address = image.data_ptr()
        if address != start + count * bytes_each or image.shape != shape:
            found.append(ImageRun(start, count, *shape[1:]))
            start, shape, bytes_each, count = address, image.shape, image.nbytes, 0
        count += 1
    return [*found, ImageRun(start, count, *shape[1:])]
