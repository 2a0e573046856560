"""How figures are written: differences of percentages in points, whatever the unit of the scores is."""

import pytest

from reca.eval import figures


@pytest.mark.parametrize(
    ("unit", "value", "score", "difference", "bounds"),
    [
        ("fraction", 0.4125, "41.2 %", "+41.2 points", "[-1.0, +41.2]"),
        ("percent", 41.25, "41.2 %", "+41.2 points", "[-0.0, +41.2]"),
        ("points", 6.514, "6.51", "+6.51 points", "[-0.01, +6.51]"),
    ],
)
def test_figures(unit, value, score, difference, bounds):
    assert figures.score(value, unit) == score and figures.difference(value, unit) == difference
    assert figures.bounds([-0.01, value], unit, sign=True) == bounds


def test_what_is_not_known():
    assert figures.bounds([None, 0.5], "fraction") == "[?, 50.0]"
    assert figures.score(float("nan"), "percent") == "? %" and figures.difference(None, "points") == "? points"
