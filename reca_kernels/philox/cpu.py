"""Counter-based random numbers on CPUs: csrc/cpu/philox.cpp."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox

LAWS = {"bits": 0, "uniform": 1, "normal": 2}


def draw(noise: Philox, law: str, out: Tensor) -> None:
    seed, ids, stream, *_ = address(noise)
    native.module.philox_fill(seed, ids, stream, *out.shape, LAWS[law], out.data_ptr(), torch.get_num_threads())


def address(noise: Philox | Tensor) -> tuple[int, int, int, int, int]:
    """(seed, address of sample ids, stream, dtype of given noise, address of given noise) for a native struct."""
    if isinstance(noise, Tensor):
        return 0, 0, 0, native.DTYPES[noise.dtype], noise.data_ptr()
    return int(noise.seed) % 2**64, noise.sample_ids.data_ptr(), noise.stream, 0, 0
