"""How scores, their differences and intervals are written: alike in reports, pages, model cards and on the terminal.

A difference of two percentages is in percentage points, written "points", and never in percent.
"""

import math
from collections.abc import Sequence

UNKNOWN = "?"  # a bound that no data tell


def percentages(unit: str) -> bool:
    """Tell whether values of a unit are shown in percent: all but those in points of the benchmark's own."""
    return unit != "points"


def scale(unit: str) -> int:
    """Return what a value is multiplied by before it is shown."""
    return 100 if unit == "fraction" else 1


def number(value: float | None, unit: str, sign: bool = False) -> str:
    """Write a value without its unit. sign: with a plus, as differences have it."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{scale(unit) * value:{'+' if sign else ''}.{1 if percentages(unit) else 2}f}"


def score(value: float | None, unit: str) -> str:
    """Write a score with its unit."""
    return number(value, unit) + (" %" if percentages(unit) else "")


def difference(value: float | None, unit: str) -> str:
    """Write a difference of two scores with its sign and unit."""
    return f"{number(value, unit, sign=True)} points"


def bounds(interval: Sequence[float | None], unit: str, sign: bool = False) -> str:
    """Write an interval in brackets, without a unit. sign: of a difference."""
    return f"[{', '.join(number(bound, unit, sign) for bound in interval)}]"
