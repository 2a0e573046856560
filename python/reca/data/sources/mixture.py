"""Mixtures of several sources of one task, and subsets of a source."""

import re
from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from reca.data.order import Block, make_order
from reca.data.sample import Sample, Source, digest
from reca.data.sources.skipped import Skipped

GLOB = re.compile(r"[*?\[{]")  # marks a path component as a pattern


class Mixture:
    """Concatenation of several sources. A sample's key is NUMBER/KEY, with sources counted from 0.

    The order of samples draws from `parts` by `weights`.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float], names: Sequence[str] = ()):
        self.parts, self.weights = list(parts), list(weights)
        self.labels = labels(names or [str(number) for number in range(len(self.parts))])
        self.first = np.cumsum([0, *map(len, self.parts)])
        self.skipped = Skipped()  # of all parts
        for part in self.parts:
            if found := getattr(part, "skipped", None):
                self.skipped.merge(found.counts, found.first)

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def images(self) -> int | None:
        """Return the number of distinct images; None if it is not known."""
        images: list[Any] = [getattr(part, "images", None) for part in self.parts]
        return None if None in images else sum(images)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's source, and its index in that source."""
        number = int(np.searchsorted(self.first, index, "right")) - 1
        return number, index - int(self.first[number])

    def __getitem__(self, index: int) -> Sample:
        number, own = self._place(index)
        return self.parts[number][own]._replace(key=self.key(index))

    def key(self, index: int) -> str:
        number, own = self._place(index)
        return f"{number}/{self.parts[number].key(own)}"

    def size(self, index: int) -> int:
        number, own = self._place(index)
        return self.parts[number].size(own)

    def identity(self) -> str:
        return digest((weight, part.identity()) for weight, part in zip(self.weights, self.parts, strict=True))

    def describe(self, names: Sequence[str]) -> str:
        """Describe the size and the share of each source. names: of the sources."""
        total = sum(self.weights)
        return "; ".join(
            f"{name} has {len(part)} samples and a share of {weight / total:.1%}"
            for name, part, weight in zip(names, self.parts, self.weights, strict=True)
        )


def labels(names: Sequence[str]) -> list[str]:
    """Shorten the names of sources to their last component, and append #NUMBER to repeated ones."""
    short = []
    for name in names:
        path = name.partition("?")[0].rstrip("/")
        parts = [part for part in re.split(r"[/:]", path) if not GLOB.search(part)]
        short.append(parts[-1] if parts and parts[-1] else name)
    return [name if short.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(short)]


class Subset:
    """Some samples of a source, in its order and with its keys. indices: ascending.

    images: number of images of which the fraction of unreadable ones is computed; None: those of the subset.
    """

    def __init__(self, source: Source, indices: np.ndarray, images: int | None = None):
        self.source, self.indices, self.images = source, indices, images
        if images is None and getattr(source, "images", None) == len(source):
            self.images = len(indices)
        self.skipped = getattr(source, "skipped", None)
        blocks = getattr(source, "blocks", None)
        if blocks is not None:
            edges = np.cumsum([0, *(block.samples for block in blocks)])
            counts = np.diff(np.searchsorted(indices, edges))
            # Reading a block costs the same, however few of its samples are used.
            self.blocks = [Block(int(n), block.bytes) for n, block in zip(counts, blocks, strict=True) if n]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.indices[index])]

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))

    def indices_of(self, keys: Set[str]) -> list[int]:
        """Return the indices of the samples with these keys."""
        return np.flatnonzero(np.isin(self.indices, indices_of(self.source, keys))).tolist()

    def size(self, index: int) -> int:
        return self.source.size(int(self.indices[index]))

    def identity(self) -> str:
        return digest([self.source.identity(), self.indices.tobytes()])


def indices_of(source: Source, keys: Set[str]) -> list[int]:
    """Return the indices of the samples with these keys.

    A source with a method of this name finds them faster than by asking for every key.
    """
    if hasattr(source, "indices_of"):
        return source.indices_of(keys)
    return [index for index in range(len(source)) if source.key(index) in keys]


def limit(source: Source, count: int, seed: int, shuffle: bool) -> Source:
    """Return the first `count` samples in the order of `seed`; all samples if there are no more.

    Each source of a mixture is limited to its share.
    """
    if isinstance(source, Mixture):
        total = sum(source.weights)
        shares = [max(1, round(count * weight / total)) for weight in source.weights]
        parts = [limit(*pair, seed, shuffle) for pair in zip(source.parts, shares, strict=True)]
        return Mixture(parts, source.weights, source.labels)
    if count >= len(source):
        return source
    order = make_order(source, seed, shuffle)
    return Subset(source, np.sort(np.fromiter(map(order.index, range(count)), np.int64, count)))
