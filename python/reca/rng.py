"""Counter-based random numbers of the driver, each a function of (seed, purpose, sample).

Processes, workers and generators have no random state: a draw is addressed by its purpose and the global id of its
sample. Resuming, resharding and different batch sizes or gradient accumulation do not change any draw, and checkpoints
need no random state.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from reca_kernels import Philox, philox_normal, philox_uniform


class RandomStream(IntEnum):
    """Independent random streams of a sample. Results of runs depend on the values: never renumber."""

    TEMPLATE = 0
    CROP = 1
    CONDITION_DROP = 2
    TIMESTEP = 3
    NOISE = 4
    MASK_RATE = 5
    MASK_ORDER = 6
    POSTERIOR = 7
    TOKEN = 8
    CONFIDENCE = 9


class CounterRNG:
    """Counter-based random numbers of one seed.

    sample_ids in its methods: int64 [B], global ids of samples within their task, unique over a whole run.
    """

    def __init__(self, seed: int, *path: int):
        """Hash (seed, *path). path: a sub-stream, such as a task or a sampling step."""
        self.seed = seed
        for part in path:
            self.seed = _mix(self.seed, part)

    def fold_in(self, step: int) -> "CounterRNG":
        """Return the random numbers of one step of an iterative sampler, independent of every other step."""
        return CounterRNG(self.seed, step)

    def noise(self, purpose: RandomStream, sample_ids: Tensor) -> Philox:
        """Return the Philox address of samples' noise, from which kernels regenerate numbers without storing them."""
        # torch.full rather than a host-to-device copy, which would synchronise.
        seed = torch.full((), self.seed, dtype=torch.int64, device=sample_ids.device)
        return Philox(seed, sample_ids, int(purpose))

    def uniform(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        """Draw fp32 [B, n] in [0, 1)."""
        return philox_uniform(self.noise(purpose, sample_ids), n)

    def normal(self, purpose: RandomStream, sample_ids: Tensor, n: int = 1) -> Tensor:
        """Draw fp32 [B, n], standard normal."""
        return philox_normal(self.noise(purpose, sample_ids), n)


def seeded_normal(seed: int, purpose: RandomStream, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw fp32 numbers of a shape, standard normal, that an image's seed alone decides."""
    one = torch.zeros(1, dtype=torch.int64, device=device)
    return CounterRNG(seed).normal(purpose, one, math.prod(shape)).view(*shape)


def _mix(seed: int, part: int) -> int:
    """Hash (seed, part) by SplitMix64 to a signed 64-bit integer (Steele, Lea, Flood 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + part + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z
