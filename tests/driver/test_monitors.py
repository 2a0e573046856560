import pytest

from reca.monitoring import monitors
from tests.driver.toy import ToyAdapter, run_toy


def warnings(watch, metrics, steps=1, tasks=("reca",)):
    return [w for u in range(steps) for w in watch.check(u, metrics, tasks)]


def test_copying_is_said_once_and_only_after_a_deep_fall():
    watch = monitors.Monitor()
    steady = {"reca/loss": 5.0, "reca/weight": 1.0}
    assert warnings(watch, steady, 300) == []
    found = warnings(watch, steady | {"reca/loss": 0.1}, 100)
    assert len(found) == 1 and "copies h_v" in found[0]


def test_a_fall_is_measured_from_a_hundred_steps_that_have_a_loss():
    watch, steady = monitors.Monitor(), {"reca/loss": 5.0, "reca/weight": 1.0}
    found = warnings(watch, steady, 50) + warnings(watch, steady | {"reca/loss": 0.1}, 49)
    assert found == []  # the baseline is not there yet
    watch = monitors.Monitor()
    assert warnings(watch, steady, 100) == []
    assert all("no sample" in text for text in warnings(watch, {"reca/loss": 0.0, "reca/weight": 0.0}, 100))


def test_a_step_that_is_not_finite_is_left_out():
    """It is skipped, and training goes on; its loss would make every mean after it NaN."""
    watch, steady = monitors.Monitor(), {"reca/loss": 5.0, "reca/weight": 1.0}
    for loss in (float("nan"), float("inf")):
        assert warnings(watch, steady, 50) == warnings(watch, steady | {"reca/loss": loss}) == []
    found = warnings(watch, steady | {"reca/loss": 0.1}, 100)
    assert len(found) == 1 and "fell to" in found[0] and "(5)" in found[0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_measurement_that_is_not_finite_is_no_baseline(broken):
    watch, first = monitors.Monitor(), {"t2i/drift": 2.0, "i2t/drift": 1.0, "reca/gap": 0.1}
    assert warnings(watch, dict.fromkeys(first, broken)) == warnings(watch, first) == []
    assert len(warnings(watch, {"t2i/drift": 2.2, "i2t/drift": 1.2, "reca/gap": 0.5})) == 3


def test_dead_batch():
    found = warnings(monitors.Monitor(), {"i2t/weight": 0.0, "i2t/loss": 0.0}, 3, ("i2t",))
    assert len(found) == 1 and "no sample of task i2t" in found[0]


def test_drift_and_gap():
    watch = monitors.Monitor()
    assert warnings(watch, {"t2i/drift": 2.0, "i2t/drift": 1.0, "reca/gap": 0.1}) == []
    found = warnings(watch, {"t2i/drift": 2.2, "i2t/drift": 1.0, "reca/gap": 0.5})
    assert ["text-to-image" in found[0], "relies on h_v" in found[1]] == [True, True]


@pytest.mark.parametrize(("t2i", "i2t", "gap"), [(2.2, 1.0, 0.2), (2.0, 1.2, 0.5), (2.0, 1.0, 0.5)])
def test_the_gap_counts_where_text_to_image_gets_worse_and_it_is_wide(t2i, i2t, gap):
    watch = monitors.Monitor()
    assert warnings(watch, {"t2i/drift": 2.0, "i2t/drift": 1.0, "reca/gap": 0.1}) == []
    found = warnings(watch, {"t2i/drift": t2i, "i2t/drift": i2t, "reca/gap": gap})
    assert len(found) == (t2i > 2) + (i2t > 1) and not any("relies on h_v" in text for text in found)


def test_the_gap_and_the_drift_may_be_measured_at_different_steps():
    watch = monitors.Monitor()
    assert warnings(watch, {"t2i/drift": 2.0}) == warnings(watch, {"reca/gap": 0.1}) == []
    assert len(warnings(watch, {"t2i/drift": 2.2})) == 1
    found = warnings(watch, {"reca/gap": 0.5}, 3)
    assert len(found) == 1 and "relies on h_v" in found[0]
    assert warnings(watch, {"t2i/drift": 2.0}) == warnings(watch, {"reca/gap": 0.5}) == []
    assert len(warnings(watch, {"t2i/drift": 2.2, "reca/gap": 0.5})) == 2  # both conditions had cleared


def test_a_run_that_goes_on_compares_with_its_own_first_steps(recipe, monkeypatch):
    """The loss falls, the run is stopped, and goes on: neither a new baseline, nor the same warning again."""
    monkeypatch.setattr(monitors, "BASELINE_STEPS", 3)
    said, check = [], monitors.Monitor.check

    def fallen(self, step, metrics, tasks):
        found = check(self, step, metrics | {"reca/loss": 5.0 if step <= 3 else 0.01, "t2i/drift": 1.0 + step}, tasks)
        said.extend((step, text.split()[1]) for text in found)
        return found

    monkeypatch.setattr(monitors.Monitor, "check", fallen)
    keys = ["train.steps=60", "optim.schedule=constant"]
    run_toy(recipe(*keys, "run_dir=" + recipe().run_dir + "_whole"))
    whole = said[:]
    said.clear()
    for steps in (4, 60):
        run_toy(recipe(*keys, f"train.steps={steps}"))
    assert said == whole and [step for step, _ in said] == [2, 27]


@pytest.mark.parametrize(
    ("roles", "i2t", "words"),
    [
        (["shared_lm"], 0.0, "understanding may be forgotten"),
        (["shared_lm"], 1.0, None),
        (["gen_head"], 0.0, None),
        (["gen_head", "und_encoder"], 0.0, "the paper freezes them"),
        (["shared_lm", "und_encoder"], 1.0, None),
    ],
)
def test_hazards_of_a_recipe(recipe, roles, i2t, words):
    found = monitors.config_warnings(recipe(f"objective.i2t.weight={i2t}"), ToyAdapter(), roles)
    assert (words is None) == (found == []) and (words is None or words in found[0])


@pytest.mark.parametrize(("first", "warned"), [("shared_lm", False), ("und_lm", True), ("gen_lm", True)])
def test_training_what_understands_is_a_hazard_only_apart_from_what_generates(recipe, first, warned):
    model = ToyAdapter()
    model.roles = lambda: ToyAdapter.roles(model) | {"layers.0.weight": first}
    found = monitors.config_warnings(recipe("objective.i2t.weight=1"), model, [first, "gen_head", "und_encoder"])
    assert ["the paper freezes them" in text for text in found] == [True] * warned


def test_weight_decay_of_nothing_is_said(recipe):
    model, asked = ToyAdapter(), recipe("optim.weight_decay=0.1", "train.roles=[gen_head]")
    assert monitors.config_warnings(asked, model, ["gen_head"]) == []
    model.decays = lambda *_: False
    assert "weight_decay=0.1 has no effect" in monitors.config_warnings(asked, model, ["gen_head"])[0]
    assert monitors.config_warnings(recipe("optim.weight_decay=0"), model, ["gen_head"]) == []


def test_understanding_is_not_warned_of_without_reca(recipe):
    """Shared weights that SFT alone trains forget nothing by reconstruction."""
    asked = recipe("objective.reca.weight=0", "objective.t2i.weight=1", "objective.i2t.weight=0")
    assert monitors.config_warnings(asked, ToyAdapter(), ["shared_lm"]) == []


def test_encoders_that_run_without_a_gradient_are_named(recipe):
    model = ToyAdapter()
    model.encoder_roles = frozenset({"codec", "und_encoder"})
    found = monitors.config_warnings(recipe("objective.i2t.weight=1"), model, ["shared_lm", "codec"])
    assert len(found) == 1 and found[0].startswith("train.roles includes codec, but the encoders run without")
