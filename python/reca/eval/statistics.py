"""Confidence intervals of a score and of the difference between two models. The sampling unit is the prompt.

The images of a prompt form a cluster, both models are compared on the same prompts (paired), and tags are strata. The
overall value is a weighted sum over tags.

Values with an upper bound, such as proportions, have score intervals (reca.eval.score_interval). A tag enters with its
effective number of prompts: the number of single-image prompts whose mean would have the same variance (Korn and
Graubard, Survey Methodology 24, 1998), adjusted for Student's t in place of the normal quantile, and at least the
actual number. A few prompts can agree by chance, so the variance is averaged with that of a proportion, the largest
possible, as if one more prompt had shown it. The degrees of freedom are Satterthwaite's. A difference is the proportion
of gains minus that of losses, to which each prompt contributes the change of its mean. With few prompts per tag, or
nearly all of them equal, coverage stays close to 95 %; that of bootstrap and normal intervals does not.

Other values have Student's intervals. Each tag's variance is averaged with the pooled variance of all tags, likewise as
if one more prompt had shown it.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from reca.eval.score_interval import Tags, Z, score_interval

IMAGES = (1, 2, 4, 8, 12)  # images per prompt in the power table


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def by_prompt(values: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, list[float]]]:
    """Group (tag, item, value) triples, one per image, as tag -> item -> values."""
    groups: dict[str, dict[str, list[float]]] = {}
    for tag, item, value in values:
        groups.setdefault(tag, {}).setdefault(item, []).append(value)
    return groups


@functools.lru_cache(maxsize=1024)
def t_quantile(freedom: float) -> float:
    """Compute the 97.5 % quantile of Student's t, for freedom >= 1, by integrating the density over atan(t / √f)."""
    f = min(freedom, 1e5)  # beyond that it equals the normal quantile to four digits
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (f - 1)
    areas = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return math.sqrt(f) * math.tan(np.interp(0.95 * areas[-1], areas, angles))


def _weights(
    groups: Mapping[str, Mapping[str, Sequence[float]]], given: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the weight of each tag in the overall value. None: proportional to its number of prompts.

    Weights that sum to 1 are renormalised over the tags present. Others, those of a sum, are returned as given.
    """
    if given is not None:
        found = {tag: given.get(tag, 0.0) for tag in groups}
        there = math.fsum(found.values()) if math.isclose(math.fsum(given.values()), 1) else 1.0
        return {tag: _ratio(weight, there) for tag, weight in found.items()}
    total = sum(len(items) for items in groups.values())
    return {tag: len(items) / total for tag, items in groups.items()}


class Estimate(NamedTuple):
    """A score, or a difference of two scores, overall and per tag."""

    overall: Interval
    tags: dict[str, Interval]


def estimate(
    values: Iterable[tuple[str, str, float]],
    weights: Mapping[str, float] | None = None,
    top: float | None = None,
) -> Estimate:
    """Compute a score with its interval. values: (tag, item, value) of each image.

    weights: weights of the tags, see `Score`. top: upper bound of the values, whose lower bound is 0; None: unbounded.
    Raises ValueError if there are no values.
    """
    return _clipped(_estimate([by_prompt(values)], weights, top), 0.0, top)


def _clipped(found: Estimate, least: float, top: float | None) -> Estimate:
    """Clip intervals to the range of possible values, which those of few prompts can exceed."""
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
) -> Estimate:
    """Compute after - before with its interval, over the prompts that both contain.

    top: see `estimate`; None also for two evaluations of one model with equal settings, whose difference is exactly 0.
    Raises ValueError if they share no prompt.
    """
    found = _estimate(shared(by_prompt(after), by_prompt(before)), weights, top)
    return _clipped(found, -top if top else 0.0, top)


def shared(a: Mapping[str, dict], b: Mapping[str, dict]) -> list[dict[str, dict[str, list[float]]]]:
    """Keep the prompts that both contain, in the order of the first."""
    names = {tag: [name for name in items if name in b.get(tag, {})] for tag, items in a.items()}
    return [{tag: {name: side[tag][name] for name in kept} for tag, kept in names.items() if kept} for side in (a, b)]


def _estimate(
    sides: Sequence[Mapping[str, Mapping[str, Sequence[float]]]],
    given: Mapping[str, float] | None,
    top: float | None = None,
) -> Estimate:
    """Estimate one side, or the first minus the second."""
    if not sides[0]:
        raise ValueError("no interval can be computed: no prompt has a value (in both)")
    weights = _weights(sides[0], given)
    groups = [_group([side[tag] for side in sides]) for tag in sides[0]]
    shares = np.array([weights[tag] for tag in sides[0]])
    value = float(sum(share * group.value for share, group in zip(shares, groups, strict=True)))
    freedom = sum(group.freedom for group in groups)
    pooled = _ratio(sum(group.variance * group.freedom for group in groups), freedom)

    def margins(some: Sequence[Group], weights: np.ndarray) -> tuple[float, float]:
        if top:
            return _score_margins(some, weights, top, paired=len(sides) > 1)
        return _student_margins(some, weights, pooled, freedom)

    tags = {}
    for tag, group in zip(sides[0], groups, strict=True):
        low, high = margins([group], np.ones(1))
        tags[tag] = Interval(group.value, group.value - low, group.value + high)
    low, high = margins(groups, shares) if shares.any() else (0.0, 0.0)
    return Estimate(Interval(value, value - low, value + high), tags)


class Group(NamedTuple):
    """A tag: its value, the means of its prompts (or their differences), and the variance between prompts."""

    value: float
    means: np.ndarray  # [prompts]
    variance: float

    @property
    def freedom(self) -> int:
        """Return the degrees of freedom of the variance."""
        return len(self.means) - 1


def _group(sides: Sequence[Mapping[str, Sequence[float]]]) -> Group:
    """Compute the Group of one side, or of the first minus the second. sides: the values of each prompt.

    Its value is a mean over images, a ratio of sums, so the variance is that of the ratio's residuals.
    """
    value, means, residuals = 0.0, np.zeros(len(sides[0])), np.zeros(len(sides[0]))
    for sign, side in zip((1, -1), sides, strict=False):
        sums = np.array([math.fsum(side[name]) for name in sides[0]])
        counts = np.array([len(side[name]) for name in sides[0]])
        mean = float(sums.sum() / counts.sum())
        value += sign * mean
        means += sign * sums / counts
        residuals += sign * (sums - mean * counts) / counts.mean()
    same = len(means) < 2 or np.abs(residuals).max() < 1e-12 * max(1.0, abs(value))  # up to rounding
    return Group(value, means, 0.0 if same else float(residuals @ residuals) / (len(means) - 1))


def _freedom(parts: np.ndarray, freedoms: np.ndarray) -> float:
    """Compute Satterthwaite's degrees of freedom of a sum of variances."""
    return _ratio(float(parts.sum()) ** 2, float((parts**2 / np.maximum(freedoms, 1)).sum()))


def _score_margins(groups: Sequence[Group], weights: np.ndarray, top: float, paired: bool) -> tuple[float, float]:
    """Return the distances from a weighted sum of proportions to the lower and upper bounds of its interval."""
    prompts = np.array([len(group.means) for group in groups])
    gains, losses = (np.array([_part(sign * group.means / top) for group in groups]) for sign in (1, -1))
    whole = gains + losses - (gains - losses) ** 2  # the variance if every prompt's value were -1, 0 or 1
    between = np.array([group.variance for group in groups]) / top**2
    variances = ((prompts - 1) * between + whole) / prompts**2
    variances[between == 0] = 0.0  # if all prompts agree, use their actual number
    t = t_quantile(_freedom(weights**2 * variances, prompts - 1)) if variances.any() else Z
    sizes = (Z / t) ** 2 * whole / np.where(variances > 0, variances, np.inf)
    low, high = score_interval(Tags(gains, losses, np.maximum(sizes, prompts), weights), paired)
    middle = float(weights @ (gains - losses))
    return top * (middle - low), top * (high - middle)


def _part(values: np.ndarray) -> float:
    return float(values.clip(0, 1).mean())


def _student_margins(groups: Sequence[Group], weights: np.ndarray, pooled: float, freedom: int) -> tuple[float, float]:
    """Return the distances from a weighted sum to the lower and upper bounds of Student's interval, which are equal.

    pooled, freedom: variance pooled over all tags, and its degrees of freedom. A tag of one prompt has these, a tag of
    two those of the mean of both variances, by Satterthwaite.
    """
    if not freedom:
        return math.inf, math.inf
    prompts = np.array([len(group.means) for group in groups])
    between = np.array([group.variance for group in groups])
    variances = weights**2 * ((prompts - 1) * between + pooled) / prompts**2
    if not variances.any():
        return 0.0, 0.0
    freedoms = np.where(prompts > 2, prompts - 1, np.where(prompts == 2, 4 * freedom / (freedom + 3), freedom))
    margin = t_quantile(_freedom(variances, freedoms)) * math.sqrt(variances.sum())
    return margin, margin


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


# ---- power ----


class Power(NamedTuple):
    """The probability that a difference is detected: that its 95 % interval excludes 0."""

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
    """Estimate the power of this comparison if repeated with other numbers of images per prompt.

    The variance of a prompt's difference is split into components between prompts and between the images of a prompt.
    With one image per prompt it cannot be split and is attributed to images alone. Return [] if the variance is 0.
    """
    sides = shared(by_prompt(after), by_prompt(before))
    share = _weights(sides[0], weights)
    table = []
    for count in images:
        variance = sum(share[tag] ** 2 * _variance(sides, tag, count) for tag in sides[0])
        if variance == 0:
            return []
        table += [Power(count, d, _power(d, math.sqrt(variance))) for d in differences]
    return table


def _variance(sides: Sequence[Mapping[str, Mapping[str, Sequence[float]]]], tag: str, images: int) -> float:
    """Compute the variance of a tag's mean difference with `images` images per prompt."""
    names = list(sides[0][tag])
    deltas = np.array([np.mean(sides[0][tag][n]) - np.mean(sides[1][tag][n]) for n in names])
    total = float(deltas.var(ddof=1)) if len(names) > 1 else 0.0
    within, single = [], []  # variance of one image, and its contribution to the mean of a prompt
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
    z, normal = abs(effect) / error, NormalDist()
    return normal.cdf(z - Z) + normal.cdf(-z - Z)
