"""What the figures of a study are taken to say: intervals, differences and verdicts."""

import pytest

from reca.studies import judge
from reca.studies.study import Claim


def rate(hits, trials=100):
    return {"value": 100 * hits / trials, "hits": hits, "trials": trials}


def test_intervals():
    assert judge.mean([rate(50)]) == pytest.approx((50.0, 40.383, 59.617), abs=1e-3)  # Wilson
    # Three values of mean 20 and deviation 10: Student's quantile with two degrees of freedom is 4.303.
    spread = judge.mean([{"value": v} for v in (10.0, 20.0, 30.0)])
    assert spread == pytest.approx((20.0, 20 - 24.84, 20 + 24.84), abs=1e-2)
    assert judge.mean([{"value": 3.0}]) == (3.0, None, None)
    for interval in (None, [None, 2.0], [0.0, None]):  # a loss has none, and one prompt tells none
        some, other = {0: {"value": 3.0, "interval": [2.0, 4.0]}}, {0: {"value": 1.0, "interval": interval}}
        assert judge.difference(some, other) == (2.0, None, None)
        assert judge.difference(other, some) == (-2.0, None, None)
    # Newcombe 1998, method 10, the first example of its table II: 56 of 70 against 48 of 80.
    gap = judge.difference({0: rate(56, 70)}, {0: rate(48, 80)})
    assert gap == pytest.approx((20.0, 5.24, 33.39), abs=1e-2)
    # Over seeds, differences are paired.
    variant, than = {s: rate(50 + 10 * s) for s in range(3)}, {s: rate(40 + 9 * s) for s in range(3)}
    assert judge.difference(variant, than) == pytest.approx((11.0, 11 - 2.484, 11 + 2.484), abs=1e-3)
    assert judge.difference({0: rate(1)}, {1: rate(1)}) is None


def test_seeds_without_spread_are_not_certain():
    """Where all seeds agree, the interval is that over the prompts of all of them: here no hit in 300, Wilson."""
    none, all_of_them = {s: rate(0) for s in range(3)}, {s: rate(100) for s in range(3)}
    assert judge.mean(list(none.values())) == pytest.approx((0.0, 0.0, 1.264), abs=1e-3)
    assert judge.difference(none, none) == pytest.approx((0.0, -1.264, 1.264), abs=1e-3)
    assert judge.difference(all_of_them, none) == pytest.approx((100.0, 98.212, 100.0), abs=1e-3)
    assert judge.mean([{"value": 3.0}, {"value": 3.0}]) == (3.0, None, None)
    # Suites count no hits. A model whose understanding is frozen gives the same answers on every seed.
    same, other = {"value": 60.0, "interval": [57, 64]}, {"value": 60.0, "interval": [None, None]}
    assert judge.mean([same, same]) == (60, 57, 64) and judge.mean([same, other]) == (60, None, None)
    assert (
        judge.difference({0: same}, {0: same}) == judge.difference({0: same, 1: same}, {0: same, 1: same}) == (0, -5, 5)
    )


def test_an_interval_over_seeds_holds_no_share_that_there_is_none_of():
    """Student's of 99, 100 and 95 % reaches to 104.6."""
    some, few = {s: rate(n) for s, n in enumerate((99, 100, 95))}, {s: rate(n) for s, n in enumerate((0, 2, 1))}
    assert judge.mean(list(some.values())) == pytest.approx((98.0, 91.427, 100.0), abs=1e-3)
    assert judge.difference(some, few) == pytest.approx((97.0, 90.427, 100.0), abs=1e-3)
    percent = [{"value": value, "percent": True} for value in (99.0, 100.0, 95.0)]
    assert judge.mean(percent).high == 100 and judge.mean([{"value": m["value"]} for m in percent]).high > 104


@pytest.mark.parametrize(
    "expect, interval, said",
    [
        ("higher", (5, 1, 9), "agrees"),
        ("higher", (-5, -9, -1), "disagrees"),
        ("higher", (5, -1, 9), "open"),
        ("higher", (5, 0, 9), "open"),
        ("higher", (-5, -9, 0), "open"),
        ("lower", (-5, -9, -1), "agrees"),
        ("lower", (5, 1, 9), "disagrees"),
        ("equal", (0, -3, 3), "agrees"),
        ("equal", (0, -2, 4), "open"),
        ("equal", (0, -4, 2), "open"),
        ("equal", (6, 4, 9), "disagrees"),
        ("equal", (-6, -9, -4), "disagrees"),
        ("not_lower", (-1, -3, 9), "agrees"),
        ("not_lower", (8, 5, 9), "agrees"),
        ("not_lower", (-2, -4, 9), "open"),
        ("not_lower", (-6, -9, -4), "disagrees"),
        ("not_higher", (-8, -9, 3), "agrees"),
        ("not_higher", (2, -9, 4), "open"),
        ("not_higher", (6, 4, 9), "disagrees"),
        ("higher", (5, None, None), "open"),
        ("higher", None, "not measured"),
    ],
)
def test_a_claim_agrees_only_if_its_whole_interval_does(expect, interval, said):
    claim = Claim("", "seen", "a", "b", expect, 3.0)
    assert judge.verdict(claim, interval and judge.Interval(*interval)) == said


def test_verdicts_together():
    assert judge.overall(["agrees", "not measured"]) == "agrees in part"
    assert judge.overall(["agrees", "agrees"]) == "agrees"
    assert judge.overall(["agrees", "open", "disagrees"]) == "disagrees"
    assert judge.overall(["agrees", "open"]) == "open" and judge.overall(["not measured"]) == "not measured"
