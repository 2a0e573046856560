"""Counter-based noise. One definition, the same numbers whatever the batch, packing, rank or backend."""

from typing import NamedTuple

from torch import Tensor

from reca_kernels.reference import philox as reference


class Philox(NamedTuple):
    """The address of a batch's noise.

    seed        int64 [] on the device, so that a captured CUDA graph can be replayed with another seed
    sample_ids  int64 [B], global sample ids
    stream      which of a sample's independent streams, 0..255
    """

    seed: Tensor
    sample_ids: Tensor
    stream: int


def philox_uniform(noise: Philox, n: int) -> Tensor:
    """fp32 [B, n] in [0, 1)."""
    return reference.philox_uniform(*noise, n)


def philox_normal(noise: Philox, n: int) -> Tensor:
    """fp32 [B, n], standard normal."""
    return reference.philox_normal(*noise, n)
