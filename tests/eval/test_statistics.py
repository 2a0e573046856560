"""Intervals hold what they promise, on simulated benchmarks."""

import math

import numpy as np
import pytest

from reca.eval import statistics

RUNS = 300
MEANS = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.85, "e": 0.5, "f": 0.6}
GENEVAL = dict(zip(MEANS, (80, 99, 80, 94, 100, 100), strict=True))
GAIN = 0.15  # of what a prompt lacks


def simulate(sizes: dict[str, int], images: int, rng):
    """Images of two models, right or wrong: prompts differ in difficulty, as a Beta distribution of spread 1."""
    before, after = {}, {}
    for tag, count in sizes.items():
        easy = rng.beta(MEANS[tag], 1 - MEANS[tag], count)
        names = [str(i) for i in range(count)]
        for side, chance in ((before, easy), (after, easy + GAIN * (1 - easy))):
            hits = (rng.random((count, images)) < chance[:, None]).astype(float)
            side[tag] = dict(zip(names, hits.tolist(), strict=True))
    return before, after


def rows(side):
    return [(tag, name, value) for tag, items in side.items() for name, values in items.items() for value in values]


@pytest.mark.parametrize(
    ("sizes", "images"),
    [(GENEVAL, 4), (dict.fromkeys(MEANS, 20), 2), ({"e": 30}, 1)],
    ids=["GenEval", "six small tags", "one tag"],
)
def test_coverage_of_95_percent_intervals(monkeypatch, sizes, images):
    rng, inside = np.random.default_rng(0), np.zeros(3)
    weights = {tag: 1 / len(sizes) for tag in sizes}
    for _ in range(RUNS):
        before, after = simulate(sizes, images, rng)
        change = statistics._estimate([after, before], weights, 1.0)
        score = statistics._estimate([before], weights, 1.0)
        gains = {tag: GAIN * (1 - MEANS[tag]) for tag in sizes}
        truth = np.mean(list(gains.values())), np.mean([MEANS[tag] for tag in sizes])
        inside[0] += change.overall.low <= truth[0] <= change.overall.high
        inside[1] += score.overall.low <= truth[1] <= score.overall.high
        inside[2] += np.mean([change.tags[t].low <= gains[t] <= change.tags[t].high for t in sizes])
    # Tags of a few hits or misses have a few values, and intervals that hold the truth of all of them more often.
    assert np.all((inside / RUNS >= 0.93) & (inside / RUNS <= (0.975, 0.975, 0.995))), inside / RUNS


@pytest.mark.parametrize(
    ("counts", "rate", "images"),
    [((4, 8, 16, 30, 80, 200), 0.98, 1), ((4, 8, 16, 30, 80, 200), 0.02, 4), ((80,), 0.98, 4)],
    ids=["uneven tags", "uneven tags, rare, 4 images", "one tag, rare misses, 4 images"],
)
def test_coverage_of_uneven_tags_and_rare_events(counts, rate, images):
    """The normal interval and bootstraps of these hold the truth in 70 to 90 %."""
    rng, inside, runs, tags = np.random.default_rng(0), np.zeros(2), 200, "abcdef"[: len(counts)]
    for _ in range(runs):
        before, after = {}, {}
        for tag, count in zip(tags, counts, strict=True):
            easy = rng.beta(rate, 1 - rate, count)
            for side, chance in ((before, easy), (after, 0.9 * easy)):
                hits = (rng.random((count, images)) < chance[:, None]).astype(float)
                side[tag] = dict(zip(map(str, range(count)), hits.tolist(), strict=True))
        weights = dict.fromkeys(tags, 1 / len(tags))
        score = statistics._estimate([before], weights, 1.0).overall
        change = statistics._estimate([after, before], weights, 1.0).overall
        inside += score.low <= rate <= score.high, change.low <= -0.1 * rate <= change.high
    assert np.all(inside / runs > 0.93), inside / runs


def test_students_quantile():
    known = {1: 12.7062, 2: 4.30265, 2.5: 3.57465, 3: 3.18245, 5: 2.57058, 30: 2.04227, math.inf: 1.95996}
    assert {f: statistics.t_quantile(f) for f in known} == pytest.approx(known, rel=2e-4)


def test_two_prompts_of_graded_scores_have_intervals_as_wide_as_two_values_ask():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(RUNS):
        found = statistics.estimate([("a", str(i), value) for i, value in enumerate(rng.normal(0.5, 0.1, 2))])
        inside += found.overall.low <= 0.5 <= found.overall.high
    assert inside / RUNS == pytest.approx(0.95, abs=0.03)


def test_two_prompts_of_a_larger_spread_than_that_of_others():
    """Half of their variance is that of the others, and half that of two values, which say little of it."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(RUNS):
        values = [
            (tag, str(i), x) for tag, n, s in (("a", 2, 2), ("b", 60, 1)) for i, x in enumerate(rng.normal(0, s, n))
        ]
        found = statistics.estimate(values).tags["a"]
        inside += found.low <= 0 <= found.high
    assert inside / RUNS > 0.83, inside / RUNS


@pytest.mark.parametrize("count", [4, 12])
def test_coverage_of_graded_scores_near_their_bound(count):
    """Nearly all are close to 1, so the few that are far below, and the changes that are large, are often not seen."""
    rng, inside = np.random.default_rng(0), np.zeros(2)
    for _ in range(RUNS):
        before = rng.beta(1.9, 0.1, count)
        after = before + (1 - before) * rng.random(count)
        rows = [[("a", str(i), value) for i, value in enumerate(side)] for side in (before, after)]
        score, change = (
            statistics.estimate(rows[0], top=1.0).overall,
            statistics.difference(*rows[::-1], top=1.0).overall,
        )
        inside += score.low <= 0.95 <= score.high, change.low <= 0.025 <= change.high
    assert np.all(inside / RUNS > 0.93), inside / RUNS


def test_a_few_prompts_of_little_weight_cost_little_certainty():
    """As where a benchmark weighs its categories: the spread of three prompts is hardly known, and hardly counts."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(RUNS):
        values = [
            (tag, str(i), value) for tag, n in (("a", 3), ("b", 60)) for i, value in enumerate(rng.normal(0, 1, n))
        ]
        found = statistics.estimate(values, {"a": 0.1, "b": 0.9})
        inside += found.overall.low <= 0 <= found.overall.high
    assert inside / RUNS == pytest.approx(0.95, abs=0.02)


def test_a_tag_without_a_miss_is_no_surer_beside_tags_that_vary():
    """Most of its images are right, so often all of a few are: that says little of its other prompts."""
    rng, inside, means = np.random.default_rng(0), dict.fromkeys("ab", 0), {"a": 0.85, "b": 0.6}
    for _ in range(RUNS):
        hits = [(tag, str(i), float(rng.random() < mean)) for tag, mean in means.items() for i in range(10)]
        found = statistics.estimate(hits, top=1.0)
        for tag, mean in means.items():
            inside[tag] += found.tags[tag].low <= mean <= found.tags[tag].high
    assert all(count / RUNS > 0.92 for count in inside.values()), inside
    alone = [("a", str(i), 1 / 3) for i in range(10)]  # whose variance is 3e-33 by rounding
    for others in ([], [("b", str(i), float(i % 3 == 0)) for i in range(9)]):
        assert statistics.estimate(alone + others, top=1.0).tags["a"].low < 0.1


def test_prompts_are_paired_and_images_of_a_prompt_stay_together():
    """A prompt that is easy is easy for both: pairing removes what prompts differ by."""
    before, after = simulate({"a": 60, "e": 60}, 8, np.random.default_rng(1))
    paired = statistics.difference(rows(after), rows(before)).overall
    alone = [statistics.estimate(rows(side)).overall for side in (before, after)]
    assert paired.high - paired.low < 0.6 * math.hypot(*(side.high - side.low for side in alone))
    assert paired.value == pytest.approx(alone[1].value - alone[0].value)
    # Eight images of a prompt are one draw: taken for eight prompts, they would seem to know more than they do.
    loose = [(tag, f"{name}/{i}", value) for i, (tag, name, value) in enumerate(rows(before))]
    spread = statistics.estimate(loose).overall
    assert alone[0].high - alone[0].low > 1.5 * (spread.high - spread.low)


def test_the_overall_value_is_the_mean_over_tags_or_over_prompts():
    values = [("a", "1", 1.0), ("a", "2", 1.0), ("a", "3", 0.0), ("b", "4", 0.0)]
    assert statistics.estimate(values).overall.value == pytest.approx(0.5)
    assert statistics.estimate(values, {"a": 0.5, "b": 0.5}).overall.value == pytest.approx(1 / 3)
    assert statistics.estimate(values, {"a": 1.0, "b": 1.0}).overall.value == pytest.approx(2 / 3)


def test_little_or_no_data():
    same = [("a", str(i), 1.0) for i in range(5)]
    assert statistics.difference(same, same).overall == (0, 0, 0)
    one = statistics.estimate([("a", "1", 1.0)]).overall
    assert one.value == 1 and one.low == -math.inf and one.high == math.inf
    # A tag whose five prompts agree borrows the spread of the others.
    many = [("a", str(i), 1.0) for i in range(60)]
    assert statistics.estimate(many, top=1.0).overall == pytest.approx((1, 1 - 0.0596, 1), abs=1e-4)
    assert statistics.difference(many, many, top=1.0).overall == pytest.approx((0, -0.0596, 0.0596), abs=1e-4)
    assert statistics.power(many, many) == []
    # No difference of shares is larger than 1, though the interval of a single prompt is wider than all there are.
    few = [("a", "1", 1.0), ("a", "2", 0.0), ("b", "3", 1.0)], [("a", "1", 0.0), ("a", "2", 0.0), ("b", "3", 0.0)]
    assert statistics.difference(*few).overall.high > 1
    cut = statistics.difference(*few, top=1.0)
    assert max(cut.overall.high, cut.tags["a"].high, cut.tags["b"].high) <= 1 and cut.tags["b"].value == 1
    assert statistics.difference(*few[::-1], top=1.0).overall.low >= -1
    mixed = statistics.estimate([*same, *(("b", str(i), float(i % 2)) for i in range(20))])
    assert mixed.tags["a"].value == 1 and mixed.tags["a"].low < 0.9
    with pytest.raises(ValueError, match="no interval can be computed"):
        statistics.difference(same, [("a", "9", 1.0)])
    with pytest.raises(ValueError, match="no interval can be computed"):
        statistics.estimate([])


def test_only_prompts_that_both_have_are_compared():
    after = [("a", "1", 1.0), ("a", "2", 1.0), ("a", "3", 1.0)]
    before = [("a", "2", 0.0), ("a", "3", 1.0), ("a", "9", 1.0)]
    assert statistics.difference(after, before).overall.value == 0.5


def test_a_mean_over_tags_is_one_over_those_that_both_have():
    after = [(tag, f"{tag}{i}", 0.9) for tag in MEANS for i in range(4)]
    before = [("a", f"a{i}", 0.8) for i in range(4)]
    mean, total = {tag: 1 / len(MEANS) for tag in MEANS}, dict.fromkeys(MEANS, 1.0)
    for weights in (mean, total):
        assert statistics.estimate(before, weights).overall.value == pytest.approx(0.8)
        assert statistics.difference(after, before, weights).overall.value == pytest.approx(0.1)
    two = [*before, ("b", "b0", 0.6)]
    assert statistics.estimate(two, mean).overall.value == pytest.approx(0.7)
    assert statistics.estimate(two, total).overall.value == pytest.approx(1.4)  # of a sum, such as MME's


def test_more_images_help_where_images_of_a_prompt_differ():
    """No number of images makes up for prompts that differ among themselves."""
    zero = [("a", str(i), 0.0) for i in range(20) for _ in range(2)]
    among_prompts = [("a", str(i), float(i % 2)) for i in range(20) for _ in range(2)]
    among_images = [("a", str(i), float(k)) for i in range(20) for k in range(2)]
    for after, gains in ((among_prompts, False), (among_images, True)):
        few, many = statistics.power(after, zero, None, (0.2,), (1, 12))
        assert (many.power > few.power + 0.3) == gains and (many.power == pytest.approx(few.power)) != gains
    # An image has the variance 1/2, and the mean of 20 prompts of two each 1/80: 0.2 is 1.789 standard errors.
    assert statistics.power(among_images, zero, None, (0.2,), (2,))[0].power == pytest.approx(0.432, abs=1e-3)


def test_power():
    before, after = simulate(GENEVAL, 4, np.random.default_rng(2))
    weights = {tag: 1 / 6 for tag in MEANS}
    table = statistics.power(rows(after), rows(before), weights, (0.0, 0.01, 0.036))
    found = {(p.images_per_item, p.difference): p.power for p in table}
    assert found[4, 0.0] == pytest.approx(0.05, abs=1e-3)
    assert 0.05 < found[1, 0.01] < found[4, 0.01] < found[12, 0.01] < found[12, 0.036] <= 1
    # Against what happens: share of repetitions whose interval leaves out 0.
    rng, hits = np.random.default_rng(3), 0
    for _ in range(100):
        sides = simulate(GENEVAL, 1, rng)
        hits += statistics._estimate([sides[1], sides[0]], weights, 1.0).overall.low > 0
    truth = np.mean([GAIN * (1 - MEANS[t]) for t in MEANS])
    (predicted,) = statistics.power(rows(after), rows(before), weights, (truth,), (1,))
    assert abs(hits / 100 - predicted.power) < 0.12
