"""Held-out images: no task trains on them, and which they are depends on a seed alone."""

from collections.abc import Iterable, Mapping

import numpy as np

from reca.data.errors import DataError
from reca.data.mixture import Mixture, Subset
from reca.data.order import make_order
from reca.data.sample import Source
from reca.rng import CounterRNG


def hold_out(sources: Mapping[str, Source], count: int, seed: int) -> tuple[dict[str, Source], Source]:
    """Split `count` images off the source of task reca, of a mixture from each of its sources by their weights.

    Samples of other tasks with the key of an image that is set aside are left out, too: they are of the same image
    where a data set serves several tasks.

    Returns the sources to train on, by task, and the images set aside. Raises DataError unless at least as many are
    left to train on.
    """
    whole = sources["reca"]
    if len(whole) < 2 * count:
        raise DataError(
            f"eval.holdout={count} sets more than half of the {len(whole)} images of data.images aside; lower it, or "
            "name other images by eval.holdout_from"
        )
    rest, aside, keys = _split(whole, count, seed)
    aside = Subset(aside, np.arange(len(aside)))  # no mixture: it would draw some images twice, and others never
    others = {task: _without(source, keys) for task, source in sources.items() if task != "reca"}
    if empty := [task for task, source in others.items() if not len(source)]:
        raise DataError(f"eval.holdout={count} leaves no sample of {', '.join(empty)}; lower it")
    return {task: rest if task == "reca" else others[task] for task in sources}, aside


def take(source: Source, count: int, seed: int) -> Source:
    """Return `count` images of a source, those that `hold_out` would set aside; all where there are no more."""
    return source if count >= len(source) else _split(source, count, seed)[1]


def _split(source: Source, count: int, seed: int) -> tuple[Source, Source, set[str]]:
    """Return what is left, what is set aside, and the keys of the latter."""
    if isinstance(source, Mixture):
        total = sum(source.weights)
        parts = [
            _split(part, min(len(part), max(1, round(count * weight / total))), CounterRNG(seed, number).seed)
            for number, (part, weight) in enumerate(zip(source.parts, source.weights, strict=True))
        ]
        rest, aside, named = zip(*parts, strict=True)
        keys = set().union(*named)
        left = [_without(part, keys) for part in rest]  # two of its sources may hold the same images
        mixed = (Mixture(part, source.weights, source.labels) for part in (left, aside))
        return next(mixed), next(mixed), keys
    order = make_order(source, seed)
    chosen = np.sort(np.fromiter(map(order.index, range(count)), np.int64, count))
    kept = np.setdiff1d(np.arange(len(source)), chosen, assume_unique=True)
    return Subset(source, kept), Subset(source, chosen), {source.key(int(i)) for i in chosen}


def _without(source: Source, keys: Iterable[str]) -> Source:
    """Leave out the samples of these keys; the source itself where it has none of them."""
    if isinstance(source, Mixture):
        return Mixture([_without(part, keys) for part in source.parts], source.weights, source.labels)
    kept = np.array([i for i in range(len(source)) if source.key(i) not in keys], np.int64)
    return source if len(kept) == len(source) else Subset(source, kept)
