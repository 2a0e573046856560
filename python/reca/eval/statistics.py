"""Intervals of a score and of the difference between two models, by bootstrap over prompts.

Prompts are what was sampled, so they are what is drawn again: all images of a prompt stay together (clustered), the
same prompts are drawn for both models (paired), and within their own tag only (stratified).

Two corrections make 95 % intervals hold what they promise where tags are small. In a tag of n prompts n - 1 are drawn,
which makes the variance of the mean right (Rao and Wu, 1988). A tag whose few prompts happen to agree would get an
interval of no width; two more prompts, of half a prompt's weight each, stand one standard deviation of all tags above
and below the tag's mean. Deviations are scaled by Student's t over the normal quantile, with Satterthwaite's degrees of
freedom. Where nothing varies, in a tag's or in all n prompts without a miss (or without a hit, or a difference), the
interval reaches as far as Clopper and Pearson's for 0 of n.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
Z = 1.959964  # normal quantile of 95 % intervals
IMAGES = (1, 2, 4, 8, 12)


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Clusters(NamedTuple):
    """Images of a tag, summed per prompt: [prompts] each."""

    sums: np.ndarray
    counts: np.ndarray


def clusters(values: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, list[float]]]:
    """Group (tag, item, value) of images: tag -> item -> values."""
    groups: dict[str, dict[str, list[float]]] = {}
    for tag, item, value in values:
        groups.setdefault(tag, {}).setdefault(item, []).append(value)
    return groups


def _sums(items: Mapping[str, Sequence[float]], order: Sequence[str]) -> Clusters:
    return Clusters(
        np.array([math.fsum(items[name]) for name in order]), np.array([float(len(items[name])) for name in order])
    )


@functools.lru_cache(maxsize=64)
def _draws(count: int, resamples: int, seed: int, tag: int) -> np.ndarray:
    """Draw how often each of `count` prompts, and of the two that stand for the spread of all tags, is taken."""
    chances = np.array([1.0] * count + [0.5, 0.5]) / (count + 1)
    return np.random.default_rng([seed, tag]).multinomial(max(1, count - 1), chances, resamples).astype(np.float64)


def _redrawn(groups: Sequence[Clusters], spread: float, draws: np.ndarray) -> np.ndarray:
    """Compute the mean of the first group, minus that of the second if there is one, in every resample."""
    result = np.zeros(len(draws))
    for number, group in enumerate(groups):
        size, mean = group.counts.mean(), _mean(group)
        aside = spread if number == 0 else 0.0
        sums = np.append(group.sums, [(mean + aside) * size, (mean - aside) * size])
        counts = np.append(group.counts, [size, size])
        result += (1 - 2 * number) * (draws @ sums) / (draws @ counts)
    return result


def _interval(value: float, deviations: np.ndarray, freedom: float) -> Interval:
    """Take percentiles of the deviations, scaled for the degrees of freedom; without any, nothing is known."""
    if freedom <= 0:
        return Interval(value, -math.inf, math.inf)
    low, high = np.percentile(deviations * (t_quantile(freedom) / Z), [2.5, 97.5])
    return Interval(value, value + float(low), value + float(high))


@functools.lru_cache(maxsize=1024)
def t_quantile(freedom: float) -> float:
    """Compute Student's 97.5 % quantile, from 1 degree of freedom on, by integrating the density over atan(t / √f)."""
    f = min(freedom, 1e5)  # beyond, it is the normal quantile to four digits
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (f - 1)
    areas = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(f) * math.tan(np.interp(0.95 * areas[-1], areas, angles))


def _weights(
    groups: Mapping[str, Mapping[str, Sequence[float]]], given: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the weight of every tag in the overall value; by its number of prompts where none is given.

    Weights of a mean, whose sum is 1, are those of a mean over the tags that are there. Those of a sum stay as given.
    """
    if given is not None:
        found = {tag: given.get(tag, 0.0) for tag in groups}
        there = math.fsum(found.values()) if math.isclose(math.fsum(given.values()), 1) else 1.0
        return {tag: _ratio(weight, there) for tag, weight in found.items()}
    total = sum(len(items) for items in groups.values())
    return {tag: len(items) / total for tag, items in groups.items()}


def _mean(group: Clusters) -> float:
    return float(group.sums.sum() / group.counts.sum())


class Estimate(NamedTuple):
    """A score, or a difference of two: over everything, and per tag."""

    overall: Interval
    tags: dict[str, Interval]


def estimate(
    values: Iterable[tuple[str, str, float]],
    weights: Mapping[str, float] | None = None,
    top: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Compute a score with its interval. values: (tag, item, value) of every image.

    weights: of the tags, see `Score`. top: the largest value there can be, from 0 on; None if there is none.
    Raises ValueError where there are no values.
    """
    return _clipped(_estimate([clusters(values)], weights, resamples, seed, top), 0.0, top)


def _clipped(found: Estimate, least: float, top: float | None) -> Estimate:
    """Cut intervals to the values that there are: those of a few prompts reach beyond."""
    if top is None:
        return found

    def cut(interval: Interval) -> Interval:
        return Interval(interval.value, max(interval.low, least), min(interval.high, top))

    return Estimate(cut(found.overall), {tag: cut(interval) for tag, interval in found.tags.items()})


def difference(
    after: Iterable[tuple[str, str, float]],
    before: Iterable[tuple[str, str, float]],
    weights: Mapping[str, float] | None = None,
    top: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Compute after - before with its interval, over the prompts that both have.

    top: see `estimate`; None also for one model drawn twice with the same settings, which differs by exactly 0.
    Raises ValueError where they share none.
    """
    found = _estimate(shared(clusters(after), clusters(before)), weights, resamples, seed, top)
    return _clipped(found, -top if top else 0.0, top)


def shared(a: Mapping[str, dict], b: Mapping[str, dict]) -> list[dict[str, dict[str, list[float]]]]:
    """Keep the prompts that both have, in the order of the first."""
    names = {tag: [name for name in items if name in b.get(tag, {})] for tag, items in a.items()}
    return [{tag: {name: side[tag][name] for name in kept} for tag, kept in names.items() if kept} for side in (a, b)]


def _estimate(
    sides: Sequence[Mapping[str, Mapping[str, Sequence[float]]]],
    given: Mapping[str, float] | None,
    resamples: int,
    seed: int,
    top: float | None = None,
) -> Estimate:
    """Estimate one side, or the first minus the second."""
    if not sides[0]:
        raise ValueError("there is nothing to compute an interval of: no prompt has a value (in both)")
    weights = _weights(sides[0], given)
    groups = {tag: [_sums(side[tag], list(items)) for side in sides] for tag, items in sides[0].items()}
    spreads = {tag: _spread(group) for tag, group in groups.items()}
    freedoms = {tag: len(group[0].sums) - 1 for tag, group in groups.items()}
    pooled = math.sqrt(_ratio(sum(spreads[t] * freedoms[t] for t in groups), sum(freedoms.values())))
    total_freedom = sum(freedoms.values())
    value, total, tags = 0.0, np.zeros(resamples), {}
    for number, (tag, group) in enumerate(groups.items()):
        own = _mean(group[0]) - (_mean(group[1]) if len(group) > 1 else 0.0)
        deviations = _redrawn(group, pooled, _draws(len(group[0].sums), resamples, seed, number)) - own
        known = freedoms[tag] if len(groups) == 1 or freedoms[tag] > 1 else total_freedom
        if top and not spreads[tag]:
            tags[tag] = _unvaried(own, freedoms[tag] + 1, top)
        else:
            tags[tag] = _interval(own, deviations, known)
        value += weights[tag] * own
        total += weights[tag] * deviations
    if not pooled and top:
        return Estimate(_unvaried(value, total_freedom + len(groups), top), tags)
    parts = {t: weights[t] ** 2 * max(spreads[t], pooled**2 / (freedoms[t] + 2)) / (freedoms[t] + 1) for t in groups}
    below = sum(part**2 / max(freedoms[t], 1) for t, part in parts.items())
    freedom = _ratio(sum(parts.values()) ** 2, below) if pooled else math.inf
    if len(groups) > 1:
        freedom = max(freedom, 2.0)  # a tag of two prompts has the spread of the others, too
    return Estimate(_interval(value, total, freedom if total_freedom else 0.0), tags)


def _unvaried(value: float, prompts: int, top: float) -> Interval:
    """Bound what was seen on every prompt alike."""
    reach = top * (1 - 0.025 ** (1 / prompts))
    return Interval(value, value - reach, value + reach)


def _spread(groups: Sequence[Clusters]) -> float:
    """Compute the variance between the prompts of a tag, of their mean or their mean difference."""
    means = [group.sums / group.counts for group in groups]
    deltas = means[0] - means[1] if len(means) > 1 else means[0]
    return float(deltas.var(ddof=1)) if np.ptp(deltas) else 0.0  # equal ones have a variance by rounding


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


# ---- power ----


class Power(NamedTuple):
    """How likely a difference is found, that is, its 95 % interval does not hold 0."""

    images_per_item: int
    difference: float
    power: float


def power(
    after: Iterable[tuple[str, str, float]],
    before: Iterable[tuple[str, str, float]],
    weights: Mapping[str, float] | None = None,
    differences: Sequence[float] = (0.01, 0.02, 0.05),
    images: Sequence[int] = IMAGES,
) -> list[Power]:
    """Estimate the power of repeating this comparison, with other numbers of images per prompt.

    The variance of a prompt's difference is split into what differs between prompts and what differs between the
    images of one. With one image per prompt it cannot be split, so all of it is taken to be that of images. Where
    nothing varies there is no table.
    """
    sides = shared(clusters(after), clusters(before))
    share = _weights(sides[0], weights)
    table = []
    for count in images:
        variance = sum(share[tag] ** 2 * _variance(sides, tag, count) for tag in sides[0])
        if variance == 0:
            return []
        table += [Power(count, d, _power(d, math.sqrt(variance))) for d in differences]
    return table


def _variance(sides: Sequence[Mapping[str, Mapping[str, Sequence[float]]]], tag: str, images: int) -> float:
    """Compute the variance of a tag's mean difference with this many images per prompt."""
    names = list(sides[0][tag])
    deltas = np.array([np.mean(sides[0][tag][n]) - np.mean(sides[1][tag][n]) for n in names])
    total = float(deltas.var(ddof=1)) if len(names) > 1 else 0.0
    within, single = [], []  # of one image; and as it enters the mean of a prompt
    for name in names:
        parts = [np.asarray(side[tag][name]) for side in sides]
        if all(len(part) > 1 for part in parts):
            spread = [float(part.var(ddof=1)) for part in parts]
            within.append(sum(spread))
            single.append(sum(s / len(part) for s, part in zip(spread, parts, strict=True)))
    if not within:
        return total / images / len(names)
    between = max(0.0, total - float(np.mean(single)))
    return (between + float(np.mean(within)) / images) / len(names)


def _power(effect: float, error: float) -> float:
    z = abs(effect) / error
    return _normal(z - Z) + _normal(-z - Z)


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
