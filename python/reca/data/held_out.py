"""Held-out images, on which no task trains. The choice depends only on the seed."""

from collections.abc import Mapping, Sequence, Set

import numpy as np

from reca.data.errors import DataError
from reca.data.order import make_order
from reca.data.sample import Source
from reca.data.sources.mixture import Mixture, Subset, indices_of
from reca.rng import CounterRNG


def hold_out(sources: Mapping[str, Source], count: int, seed: int) -> tuple[dict[str, Source], Source]:
    """Split `count` images off the source of task reca; of a mixture, from each of its sources by weight.

    Samples of other tasks that have the key of a held-out image are removed as well: if a dataset serves several tasks,
    they show the same image.

    Returns:
        The sources to train on, by task, and the held-out images.

    Raises:
        DataError: `count` is more than half of the images, or a task has no sample left.
    """
    whole = sources["reca"]
    rest, aside, keys = _split(whole, count, seed, 0.5)
    if len(aside) < count:
        raise DataError(
            f"eval.holdout={count} is more than half of the images of data.images, or of each of its sources: at most "
            f"{len(aside)} can be held out; lower it, or name other images with eval.holdout_from"
        )
    left = {task: rest if task == "reca" else _without(source, keys) for task, source in sources.items()}
    if empty := [name for task in sources for name in _emptied(task, sources[task], left[task])]:
        raise DataError(f"eval.holdout={count} leaves no sample for {', '.join(empty)}; lower it")
    return left, _as_one(aside, whole)


def take(source: Source, count: int, seed: int) -> Source:
    """Return the `count` images of a source that `hold_out` would choose; all images if there are no more."""
    chosen = source if count >= len(source) else _split(source, count, seed, 1.0)[1]
    return _as_one(chosen, source)


def _as_one(images: Source, whole: Source) -> Source:
    """Return the images as a plain subset: the order of a mixture would draw some of them twice and others never."""
    return Subset(images, np.arange(len(images)), len(whole))


def _split(source: Source, count: int, seed: int, most: float) -> tuple[Source, Source, set[str]]:
    """Return the remaining source, the held-out source and its keys. most: largest share of a source to hold out."""
    if isinstance(source, Mixture):
        shares = _shares(count, source.weights, [int(most * len(part)) for part in source.parts])
        parts = [
            _split(part, share, CounterRNG(seed, number).seed, most)
            for number, (part, share) in enumerate(zip(source.parts, shares, strict=True))
        ]
        rest, aside, named = zip(*parts, strict=True)
        keys = set().union(*named)
        left = [_without(part, keys) for part in rest]  # several of its sources may have the same images
        mixed = (Mixture(part, source.weights, source.labels) for part in (left, aside))
        return next(mixed), next(mixed), keys
    order, count = make_order(source, seed), min(count, int(most * len(source)))
    chosen = np.sort(np.fromiter(map(order.index, range(count)), np.int64, count))
    kept = np.setdiff1d(np.arange(len(source)), chosen, assume_unique=True)
    return Subset(source, kept), Subset(source, chosen), {source.key(int(i)) for i in chosen}


def _shares(count: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Divide `count` by weights. What exceeds a part's limit in `most` is divided among the others."""
    shares = [0] * len(most)
    for _ in range(min(count, sum(most))):
        open_ = [number for number, share in enumerate(shares) if share < most[number]]
        shares[min(open_, key=lambda number: (shares[number] + 1) / weights[number])] += 1
    return shares


def _emptied(task: str, before: Source, after: Source) -> list[str]:
    """Return the names of what has no sample left: the task, or sources of its mixture."""
    if not isinstance(before, Mixture):
        return [task] if not len(after) else []
    assert isinstance(after, Mixture)
    return [
        f"{name} of {task}"
        for name, had, has in zip(before.labels, before.parts, after.parts, strict=True)
        if len(had) and not len(has)
    ]


def _without(source: Source, keys: Set[str]) -> Source:
    """Return the source without the samples of these keys; the source itself if it has none of them."""
    if isinstance(source, Mixture):
        return Mixture([_without(part, keys) for part in source.parts], source.weights, source.labels)
    found = indices_of(source, keys)
    return Subset(source, np.delete(np.arange(len(source)), found)) if found else source
