"""Score intervals of a weighted sum of proportions, one per tag, and of paired differences of proportions.

A bound is a sum θ at the limit of what the data are compatible with: (|estimate - θ| - c)² = z² Var(θ). The variance
is that at the maximum-likelihood proportions subject to their sum being θ (Miettinen and Nurminen, Statistics in
Medicine 4, 1985; linear combinations: Martín Andrés, Álvarez Hernández and Herranz Tejedor, Stat. Methods Med. Res. 20,
2011; paired differences: Tango, Statistics in Medicine 17, 1998). With one tag it is Wilson's interval with continuity
correction. The correction c is half the effect of one prompt on the sum, averaged over tags in proportion to their
variances. If all prompts of each tag have the same outcome, the bound is exact, as in Clopper and Pearson: the observed
outcomes have a probability of 2.5 % there.
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # normal quantile of 95 % intervals
TAIL = 0.025
GRID, ROUNDS = 64, 4  # grid search for the multiplier λ, to a relative error of 2 FAR / 63 ** 4
FAR = 25.0  # half-width of the search range of log λ; at its centre the largest |a| is the mean of the sizes


class Tags(NamedTuple):
    """Observed proportions of each tag, as arrays [tags]. Gains and losses are those of pairs; a score has no losses.

    gains, losses  in [0, 1], with a sum of at most 1
    sizes          effective numbers of prompts
    weights        weights of the tags in the sum, at least 0
    """

    gains: np.ndarray
    losses: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray


def score_interval(tags: Tags, paired: bool) -> tuple[float, float]:
    """Return the 95 % bounds of the sum of weight * (gains - losses). paired: whether losses are possible."""
    return _bound(tags, paired, 1), _bound(tags, paired, -1)


def _bound(tags: Tags, paired: bool, side: int) -> float:
    """Find the lower (side=1) or upper (side=-1) bound by a search over λ, which starts at the estimate."""
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
    """Maximise the multinomial log-likelihood minus a * (gain - loss). Return gains, losses and rest, [3, grid, tags].

    a = λ * weight, [grid, tags], all of one sign. The probabilities are the counts divided by μ + a, μ - a and μ, for
    the μ at which they sum to 1. The outcome that grows towards the bound can have a count of 0, so its probability is
    1 minus the others.
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
    falls = a > 0  # gains fall and losses grow; otherwise the reverse
    own = np.where(falls, gains / np.where(falls, mu + a, 1), losses / np.where(falls, 1, mu - a)).clip(0, 1)
    if not paired:
        gain = np.where(falls, own, 1 - np.where(falls, 0, rest / np.where(falls, 1, mu)).clip(0, 1))
        return np.stack([gain, 0 * gain, 1 - gain])
    same = (rest / mu).clip(0, 1 - own)
    other = 1 - own - same
    return np.stack([np.where(falls, own, other), np.where(falls, other, own), same])
