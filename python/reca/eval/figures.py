"""Formatting of scores, differences and intervals, shared by reports, pages, model cards and the terminal.

A difference of two percentages is in percentage points, written "points", never in percent.
"""

import math
from collections.abc import Sequence

UNKNOWN = "?"  # shown for a missing or infinite value


def percentages(unit: str) -> bool:
    """Tell whether values of a unit are shown in percent: all units except a benchmark's own points."""
    return unit != "points"


def scale(unit: str) -> int:
    """Return the factor by which values are multiplied for display."""
    return 100 if unit == "fraction" else 1


def number(value: float | None, unit: str, sign: bool = False) -> str:
    """Format a value without its unit. sign: whether positive values get a plus, as in differences."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{scale(unit) * value:{'+' if sign else ''}.{1 if percentages(unit) else 2}f}"


def score(value: float | None, unit: str) -> str:
    """Format a score with its unit."""
    return number(value, unit) + (" %" if percentages(unit) else "")


def difference(value: float | None, unit: str) -> str:
    """Format a difference of two scores with its sign and unit."""
    return f"{number(value, unit, sign=True)} points"


def bounds(interval: Sequence[float | None], unit: str, sign: bool = False) -> str:
    """Format an interval in brackets, without its unit. sign: as in `number`."""
    return f"[{', '.join(number(bound, unit, sign) for bound in interval)}]"
