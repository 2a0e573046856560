"""Weights of a resize filter, bit-identical to Pillow's (src/libImaging/Resample.c)."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reca_kernels.host import no_modes

PRECISION = 22  # fractional bits of a weight: 32, less 8 for the value and 2 for sums beyond 1


class Taps(NamedTuple):
    """The filter along one dimension: an output is a weighted sum of `sizes` inputs, starting at `first`.

    first, sizes  int32 [outputs]
    weights       int32 [outputs, taps], with PRECISION fractional bits; 0 beyond sizes
    """

    first: Tensor
    sizes: Tensor
    weights: Tensor


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x < 1, 1 - x, 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


FILTERS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}  # function of the distance, and its support


@lru_cache(maxsize=256)
def taps(
    length: int, start: float, stop: float, outputs: int, name: str, device: torch.device, stream: int = 0
) -> Taps:
    """Compute the filter that resamples inputs start to stop, of `length`, to `outputs` values.

    For fewer outputs than inputs the filter is widened in proportion, for antialiasing.
    stream: the address of the GPU's current stream. Weights are cached per stream: memory evicted from the cache may
    still be in use on another stream, but on its own stream it cannot be overwritten before it has been read.
    """
    function, support = FILTERS[name]
    scale = float(np.float32(stop) - np.float32(start)) / outputs
    wide = max(scale, 1.0)
    support *= wide
    center = float(np.float32(start)) + (np.arange(outputs) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), length) - first
    at = np.arange(int(np.ceil(support)) * 2 + 1)
    values = function(np.abs((at + first[:, None] - center[:, None] + 0.5) * (1.0 / wide)))
    values[at >= count[:, None]] = 0
    total = values.cumsum(1)[:, -1:]  # summed sequentially, as in Pillow
    values = np.divide(values, total, out=values, where=total != 0) * (1 << PRECISION)
    weights = np.trunc(values + np.where(values < 0, -0.5, 0.5))
    with no_modes():
        return Taps(*(torch.from_numpy(x.astype(np.int32)).to(device) for x in (first, count, weights)))
