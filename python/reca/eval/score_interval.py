"""The score interval of a weighted sum of proportions, one of every tag, and of paired differences of proportions.

A bound is the sum θ that the data just allow: where (|estimate - θ| - c)² = z² Var(θ), with the variance at the
proportions that are most likely among those whose sum is θ (Miettinen and Nurminen, Statistics in Medicine 4, 1985;
linear combinations: Martín Andrés, Álvarez Hernández and Herranz Tejedor, Stat. Methods Med. Res. 20, 2011; paired
differences: Tango, Statistics in Medicine 17, 1998). Of one tag it is Wilson's interval. The correction for continuity
c is half of what one prompt more changes, averaged over tags by their shares of the variance. Where every prompt gave
the same, the bound is exact: what was seen has a probability of 2.5 % there, as Clopper and Pearson have it.
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # normal quantile of 95 % intervals
TAIL = 0.025
GRID, ROUNDS = 64, 4  # of the search for λ: its relative error is 2 FAR / 63 ** 4
FAR = 25.0  # of log λ, to both sides of where an average tag turns


class Tags(NamedTuple):
    """What was seen of every tag, as arrays [tags]. Gains and losses are those of pairs; a single score has no losses.

    gains, losses  in [0, 1], and no more than 1 together
    sizes          effective numbers of prompts
    weights        of the tags in the sum, from 0 on
    """

    gains: np.ndarray
    losses: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray


def score_interval(tags: Tags, paired: bool) -> tuple[float, float]:
    """Return the 95 % bounds of the sum of weight * (gains - losses). paired: whether there can be losses."""
    return _bound(tags, paired, 1), _bound(tags, paired, -1)


def _bound(tags: Tags, paired: bool, side: int) -> float:
    """Find the bound on one side: 1 is the lower one. It is searched along λ, from the estimate on."""
    gains, losses, sizes, weights = tags
    estimate = float(weights @ (gains - losses))
    seen = np.stack([gains, losses, 1 - gains - losses])
    constant = bool(np.all(seen.max(0) > 1 - 1e-12))
    steps = weights / sizes
    low, high = -FAR, FAR
    for _ in range(ROUNDS):
        grid = np.linspace(low, high, GRID)
        turned = side * np.exp(grid)[:, None] * weights * (sizes.mean() / weights.max())
        likely = _most_likely(gains * sizes, losses * sizes, seen[2] * sizes, turned, paired)
        sums = (likely[0] - likely[1]) @ weights
        if constant:
            outside = np.log((likely * (seen > 0.5)[:, None]).sum(0).clip(1e-300)) @ sizes < math.log(TAIL)
        else:
            parts = weights**2 * (likely[0] + likely[1] - (likely[0] - likely[1]) ** 2).clip(0) / sizes
            variance = parts.sum(1)
            half = 0.5 * (parts @ steps) / variance.clip(1e-300)
            outside = np.abs(estimate - sums) - half > Z * np.sqrt(variance)
        first = int(outside.argmax()) if outside.any() else GRID - 1
        low, high = grid[max(first - 1, 0)], grid[first]
    return float(sums[first])


def _most_likely(gains: np.ndarray, losses: np.ndarray, rest: np.ndarray, a: np.ndarray, paired: bool) -> np.ndarray:
    """Maximise the multinomial likelihood minus a * (gain - loss): [3, grid, tags], of gains, losses and the rest.

    a = λ * weight, [grid, tags], all of one sign. The counts over μ + a, μ - a and μ are the probabilities, for the μ
    at which they sum to 1; what moves towards the bound may have no counts, so it is what the others leave.
    """
    total = gains + losses + rest
    if not paired:
        half = (total - a) / 2
        mu = half + np.sqrt(half**2 + a * rest)
    else:  # the largest root of μ³ - total μ² + (a (gains - losses) - a²) μ + a² rest
        slope = a * (gains - losses) - a**2
        q = np.sqrt(total**2 / 9 - slope / 3)
        r = total**3 / 27 - total * slope / 6 - a**2 * rest / 2
        mu = total / 3 + 2 * q * np.cos(np.arccos((r / q**3).clip(-1, 1)) / 3)
    falls = a > 0  # gains do, and losses grow; else the other way round
    own = np.where(falls, gains / np.where(falls, mu + a, 1), losses / np.where(falls, 1, mu - a)).clip(0, 1)
    if not paired:
        gain = np.where(falls, own, 1 - np.where(falls, 0, rest / np.where(falls, 1, mu)).clip(0, 1))
        return np.stack([gain, 0 * gain, 1 - gain])
    same = (rest / mu).clip(0, 1 - own)
    other = 1 - own - same
    return np.stack([np.where(falls, own, other), np.where(falls, other, own), same])
