"""Confidence intervals over seeds, and verdicts on claims."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reca.demo.measure import Rate
from reca.eval.statistics import t_quantile
from reca.studies.study import Claim

# {"value"}, with "hits" and "trials" or "interval" if known; "percent": true for a percentage without counts
Measure = Mapping[str, Any]
NOT_MEASURED = "not measured"


class Interval(NamedTuple):
    """A value in percent, or a difference in points, with its 95 % confidence interval; None: unknown bound."""

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "interval": [self.low, self.high]}


def mean(measures: Sequence[Measure]) -> Interval:
    """Compute the mean over seeds. With one seed or equal values, the interval is that over prompts."""
    values = [m["value"] for m in measures]
    if _differ(values):
        return _over_seeds(values, *_bounds(measures, 0.0))
    return Interval(statistics.mean(values), *_own(_pooled(measures)))


def difference(variant: Mapping[int, Measure], than: Mapping[int, Measure]) -> Interval | None:
    """Compute variant - than over their common seeds; None if there are none.

    With one seed or equal differences, the interval combines those of both sides (Newcombe 1998, method 10), which
    treats prompts as unpaired.
    """
    seeds = sorted(variant.keys() & than.keys())
    if not seeds:
        return None
    gaps = [variant[s]["value"] - than[s]["value"] for s in seeds]
    if _differ(gaps):
        return _over_seeds(gaps, *_bounds([*variant.values(), *than.values()], -100.0))
    a, b = (_pooled([side[s] for s in seeds]) for side in (variant, than))
    gap, (a_low, a_high), (b_low, b_high) = statistics.mean(gaps), _own(a), _own(b)
    if a_low is None or a_high is None or b_low is None or b_high is None:
        return Interval(gap, None, None)
    low = math.hypot(a["value"] - a_low, b_high - b["value"])
    return Interval(gap, gap - low, gap + math.hypot(a_high - a["value"], b["value"] - b_low))


def verdict(claim: Claim, found: Interval | None) -> str:
    """Return "agrees" or "disagrees" if the whole interval does, else "open"; NOT_MEASURED without a difference."""
    if found is None:
        return NOT_MEASURED
    if found.low is None or found.high is None:
        return "open"
    margin, low, high = claim.margin, found.low, found.high
    if claim.expect in ("lower", "not_higher"):
        low, high = -high, -low
    if claim.expect == "equal":
        agrees, disagrees = -margin <= low and high <= margin, high < -margin or low > margin
    elif claim.expect in ("not_lower", "not_higher"):
        agrees, disagrees = low >= -margin, high < -margin
    else:
        agrees, disagrees = low > 0, high < 0
    return "agrees" if agrees else "disagrees" if disagrees else "open"


def overall(verdicts: Sequence[str]) -> str:
    """Combine the verdicts on all claims; "agrees in part" if some are not measured."""
    measured = [v for v in verdicts if v != NOT_MEASURED]
    for one in ("disagrees", "open"):
        if one in measured:
            return one
    if not measured:
        return NOT_MEASURED
    return "agrees" if len(measured) == len(verdicts) else "agrees in part"


def _differ(values: Sequence[float]) -> bool:
    """Tell whether values differ between seeds. Equal values, such as 0 % each, give no estimate of the spread."""
    return max(values) - min(values) > 1e-9


def _bounds(measures: Sequence[Measure], least: float) -> tuple[float, float]:
    """Return the range of possible values: `least` to 100 for percentages, unbounded for other measures."""
    shares = all(m.get("trials") or m.get("percent") for m in measures)
    return (least, 100.0) if shares else (-math.inf, math.inf)


def _pooled(measures: Sequence[Measure]) -> Measure:
    """Pool the counts of all seeds. Without counts, average the values and interval bounds."""
    if len(measures) == 1:
        return measures[0]
    value = statistics.mean(m["value"] for m in measures)
    if not all(m.get("trials") for m in measures):
        lows, highs = zip(*map(_own, measures), strict=True)
        known = None not in lows + highs
        return {"value": value, "interval": [statistics.mean(lows), statistics.mean(highs)] if known else None}
    return {"value": value, "hits": sum(m["hits"] for m in measures), "trials": sum(m["trials"] for m in measures)}


def _over_seeds(values: Sequence[float], least: float, most: float) -> Interval:
    """Compute Student's t interval, clipped to the possible values, which few and scattered seeds would exceed."""
    middle = statistics.mean(values)
    freedom = len(values) - 1
    reach = t_quantile(freedom) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(middle, max(least, middle - reach), min(most, middle + reach))


def _own(measure: Measure) -> tuple[float | None, float | None]:
    """Return the interval over prompts: Wilson for counts, else the given one."""
    if measure.get("trials"):
        low, high = Rate(measure["hits"], measure["trials"]).wilson()
        return 100 * low, 100 * high
    bounds = measure.get("interval") or (None, None)
    return bounds[0], bounds[1]
