"""Which sample stands at which position of the endless stream. There is no state but the position."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from reca.data.sample import Source
from reca.rng import CounterRNG

WINDOW = 2**27  # bytes of blocks that are shuffled together
STRETCH = 1024  # positions of a mixture that are divided among its sources at a time
NEAR = 4  # substitutes that are looked for beside the sample, before any other sample of the source is taken


class Block(NamedTuple):
    """Samples that follow each other and are read at once, such as a row group."""

    samples: int
    bytes: int


class Order(Protocol):
    def index(self, position: int) -> int:
        """Return the sample at a position. Every epoch holds every sample once."""
        ...

    def substitute(self, position: int, attempt: int) -> int:
        """Return what stands in for it when it cannot be used. attempt: counts from 1."""
        ...


def make_order(source: Source, seed: int, shuffle: bool = True) -> Order:
    """Return the order of a source's samples.

    It is shuffled over all of them, or within windows of its `blocks` if it has some, or as they are stored. Of a
    mixture, every source has its own order.
    """
    parts = getattr(source, "parts", None)
    if parts is not None:
        orders = [make_order(part, CounterRNG(seed, number).seed, shuffle) for number, part in enumerate(parts)]
        weights: Any = getattr(source, "weights", None)  # of a mixture
        return Mixed(orders, [len(part) for part in parts], weights, CounterRNG(seed, len(parts)).seed)
    if not shuffle:
        return Stored(len(source), seed)
    blocks = getattr(source, "blocks", None)
    return Shuffled(len(source), seed) if blocks is None else Windows(blocks, seed)


class Shuffled:
    """Every epoch is a permutation of all samples. A substitute is the same slot of another permutation."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._order = functools.lru_cache(maxsize=4)(self._order_of)  # its own: others would push it out

    def index(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        return int(self._order(self.seed, epoch)[slot])

    def substitute(self, position: int, attempt: int) -> int:
        epoch, slot = divmod(position, self.size)
        return int(self._order(CounterRNG(self.seed, 1 + attempt).seed, epoch)[slot])

    def _order_of(self, seed: int, epoch: int) -> np.ndarray:
        return _permutation(CounterRNG(seed, epoch), self.size).astype(np.int32)


class Stored(Shuffled):
    """Every epoch is the samples as they are stored. Substitutes are any."""

    def index(self, position: int) -> int:
        return position % self.size


class Windows:
    """Every epoch permutes blocks, and samples among as many blocks as fill a window.

    A sample costs as much to read as its whole block, so neighbours in the stream come out of few blocks.
    """

    def __init__(self, blocks: Sequence[Block], seed: int):
        self.seed = seed
        self.samples = np.array([block.samples for block in blocks])
        self.bytes = np.array([block.bytes for block in blocks])
        self.first = np.cumsum(self.samples) - self.samples
        self.size = int(self.samples.sum())
        self._far = Shuffled(self.size, seed)
        self._windows = functools.lru_cache(maxsize=4)(self._windows_of)
        self._samples = functools.lru_cache(maxsize=16)(self._samples_of)

    def index(self, position: int) -> int:
        return self._at(position, 0)

    def substitute(self, position: int, attempt: int) -> int:
        if attempt > NEAR:
            return self._far.substitute(position, attempt)
        return self._at(position, attempt)

    def _at(self, position: int, attempt: int) -> int:
        epoch, slot = divmod(position, self.size)
        starts, _ = self._windows(epoch)
        window = int(np.searchsorted(starts, slot, "right")) - 1
        return int(self._samples(epoch, window, attempt)[slot - starts[window]])

    def _windows_of(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the first slot of every window, and its blocks."""
        order = _permutation(CounterRNG(self.seed, epoch), len(self.samples))
        windows: list[list[int]] = []
        room = 0
        for block in order:
            if not windows or self.bytes[block] > room:
                windows.append([])
                room = WINDOW
            windows[-1].append(block)
            room -= self.bytes[block]
        counts = [int(self.samples[window].sum()) for window in windows]
        return np.array([0, *itertools.accumulate(counts[:-1])]), [np.array(window) for window in windows]

    def _samples_of(self, epoch: int, window: int, attempt: int) -> np.ndarray:
        blocks = self._windows(epoch)[1][window]
        inside = np.concatenate([np.arange(self.samples[b]) + self.first[b] for b in blocks])
        return inside[_permutation(CounterRNG(self.seed, epoch, window, attempt), len(inside))]


class Mixed:
    """Draws from several sources by weight, each in its own order through its own epochs.

    Among STRETCH positions a source has its share, up to rounding that evens out; which positions are its is drawn.
    """

    def __init__(self, orders: Sequence[Order], sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.orders, self.seed = orders, seed
        self.first = np.cumsum([0, *sizes])
        self.shares = np.cumsum([0.0, *weights]) / sum(weights)
        self.shares[-1] = 1.0
        self._stretch = functools.lru_cache(maxsize=8)(self._stretch_of)

    def index(self, position: int) -> int:
        source, place = self.place(position)
        return int(self.first[source]) + self.orders[source].index(place)

    def substitute(self, position: int, attempt: int) -> int:
        source, place = self.place(position)
        return int(self.first[source]) + self.orders[source].substitute(place, attempt)

    def place(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and its own position there."""
        stretch, slot = divmod(position, STRETCH)
        picks, before = self._stretch(stretch)
        source = int(picks[slot])
        return source, int(before[source]) + int((picks[:slot] == source).sum())

    def _stretch_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every slot, and how many samples of each source came before."""
        ends = (np.floor(self.shares * (STRETCH * n)).astype(np.int64) for n in (number, number + 1))
        before, after = (end[1:] - end[:-1] for end in ends)
        picks = np.repeat(np.arange(len(before)), after - before)
        return picks[_permutation(CounterRNG(self.seed, number), STRETCH)], before


def _permutation(rng: CounterRNG, size: int) -> np.ndarray:
    return torch.randperm(size, generator=torch.Generator().manual_seed(rng.seed)).numpy()
