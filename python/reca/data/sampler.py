"""The order of samples, a function of (seed, position). The position is the only state."""

import functools

import torch

from reca.rng import CounterRNG


def sample_index(seed: int, size: int, position: int) -> int:
    """Return the index of the sample at `position` of the endless stream: every epoch is a permutation."""
    epoch, slot = divmod(position, size)
    return int(_order(seed, epoch, size)[slot])


def substitute_index(seed: int, size: int, position: int, attempt: int) -> int:
    """Return the index of the sample that replaces an unreadable one: the same slot of another permutation."""
    epoch, slot = divmod(position, size)
    return int(_order(CounterRNG(seed, 1 + attempt).seed, epoch, size)[slot])


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(CounterRNG(seed, epoch).seed)
    return torch.randperm(size, generator=generator).to(torch.int32)
