"""Order of samples: the sample at each position of the infinite stream. The position is the only state."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from reca.data.recently_used import RecentlyUsed
from reca.data.sample import Source
from reca.rng import CounterRNG

WINDOW = 2**27  # bytes of blocks that are shuffled together
STRETCH = 1024  # positions of a mixture that are divided among its sources at a time
NEAR = 4  # attempts to find a substitute in the same window; later ones try the whole source


class Block(NamedTuple):
    """Consecutive samples that are read together, such as a row group."""

    samples: int
    bytes: int


class Order(Protocol):
    def index(self, position: int) -> int:
        """Return the index of the sample at a position. Every epoch has every sample once."""
        ...

    def substitute(self, position: int, attempt: int) -> int:
        """Return the index of a substitute for a sample that cannot be used. attempt: from 1."""
        ...


def make_order(source: Source, seed: int, shuffle: bool = True) -> Order:
    """Return the order of a source's samples.

    Samples are shuffled globally, or within windows of blocks if the source has `blocks`; without `shuffle` they keep
    the stored order. Each source of a mixture has its own order.
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
    """Global shuffle: every epoch is a permutation of all samples. A substitute is any sample."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._order = RecentlyUsed(self._order_of, lambda _: 1, 2)  # this epoch and the next

    def index(self, position: int) -> int:
        epoch, slot = divmod(position, self.size)
        return int(self._order(epoch)[slot])

    def substitute(self, position: int, attempt: int) -> int:
        return CounterRNG(self.seed, position, 1 + attempt).seed % self.size

    def _order_of(self, epoch: int) -> np.ndarray:
        return _permutation(CounterRNG(self.seed, epoch), self.size)


class Stored(Shuffled):
    """Stored order in every epoch. Substitutes are random."""

    def index(self, position: int) -> int:
        return position % self.size


class Windows:
    """Windowed shuffle: every epoch permutes the blocks, and the samples within windows of these blocks.

    Reading a sample costs as much as reading its whole block, so samples close in the stream come from few blocks.
    """

    def __init__(self, blocks: Sequence[Block], seed: int):
        self.seed = seed
        self.samples = np.array([block.samples for block in blocks])
        self.bytes = np.array([block.bytes for block in blocks])
        self.first = np.cumsum(self.samples) - self.samples
        self.size = int(self.samples.sum())
        self._far = Shuffled(self.size, seed)
        self._windows = RecentlyUsed(self._windows_of, lambda _: 1, 4)
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
        """Return the first slot and the blocks of every window."""
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
    """Order of a mixture: draws from several sources by weight, each with its own order and epochs.

    Of every STRETCH positions a source gets its share, with rounding errors that do not accumulate. Which of the
    positions it gets is random.
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
        """Return the number of the source at a position, and the position in that source's own order."""
        stretch, slot = divmod(position, STRETCH)
        picks, before = self._stretch(stretch)
        source = int(picks[slot])
        return source, int(before[source]) + int((picks[:slot] == source).sum())

    def _stretch_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every slot, and the number of earlier samples of each source."""
        ends = (np.floor(self.shares * (STRETCH * n)).astype(np.int64) for n in (number, number + 1))
        before, after = (end[1:] - end[:-1] for end in ends)
        picks = np.repeat(np.arange(len(before)), after - before)
        return picks[_permutation(CounterRNG(self.seed, number), STRETCH)], before


def _permutation(rng: CounterRNG, size: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(rng.seed)
    dtype = torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64
    return torch.randperm(size, generator=generator, dtype=dtype).numpy()
