"""The order of samples, as a function of (seed, position). There is no state but the position."""

import functools

import torch

from reca.rng import CounterRNG


def sample_index(seed: int, size: int, position: int) -> int:
    """Index of the sample at `position` of the endless stream: every epoch is a permutation of all samples."""
    epoch, slot = divmod(position, size)
    return int(_order(seed, epoch, size)[slot])


def substitute_index(seed: int, size: int, position: int, attempt: int) -> int:
    """Index of the sample that stands in for an unreadable one: the same slot of another permutation."""
    epoch, slot = divmod(position, size)
    return int(_order(CounterRNG(seed, 1 + attempt).seed, epoch, size)[slot])


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(CounterRNG(seed, epoch).seed)
    return torch.randperm(size, generator=generator).to(torch.int32)
