"""Steps that make no update: which, that all ranks agree, what is written down, and that a resumed run agrees."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from reca import checkpoint, distributed
from reca.config.recipe import TrainConfig
from reca.io import jsonl
from reca.options.fields import RecipeError
from reca.trainer import Trainer
from reca.training.skipped_steps import NonFiniteError, SkippedSteps
from tests.driver.toy import ToyAdapter, run_toy, weights


def steps(tmp_path, z=6.0, window=200) -> SkippedSteps:
    return SkippedSteps(tmp_path, TrainConfig(skip_spikes=z, spike_window=window))


def usual(count: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(1, 0.1) for _ in range(count)]


def test_the_limit_is_the_mean_plus_z_standard_deviations(tmp_path):
    judge, norms = steps(tmp_path, z=4.0, window=50), usual(80)
    assert all(judge.accepts(norm) for norm in norms)
    limit = statistics.fmean(norms[-50:]) + 4 * statistics.pstdev(norms[-50:])
    state = judge.state()
    for norm, accepted in ((limit * (1 - 1e-9), True), (limit * (1 + 1e-9), False)):
        again = steps(tmp_path, z=4.0, window=50)
        again.load_state(state)
        assert again.accepts(norm) == accepted


def test_nothing_is_a_spike_before_half_of_the_window(tmp_path):
    judge = steps(tmp_path, window=20)
    assert [judge.accepts(norm) for norm in [1.0] * 9 + [1e6]] == [True] * 10
    judge = steps(tmp_path, window=20)
    assert [judge.accepts(norm) for norm in [1.0] * 10 + [1e6]] == [True] * 10 + [False]


def test_off_by_default(tmp_path):
    judge = SkippedSteps(tmp_path, TrainConfig())
    assert all(judge.accepts(norm) for norm in [*usual(300), 1e30]) and not judge.norms


def test_an_outlier_does_not_hide_the_next(tmp_path):
    judge = steps(tmp_path)
    assert all(map(judge.accepts, usual(200)))
    assert [judge.accepts(norm) for norm in (1e12, 5.0, math.inf, 5.0, 1.0)] == [False, False, False, False, True]
    assert all(map(math.isfinite, judge.norms))


@pytest.mark.parametrize("factor", [1.7, 3, 10, 100])
def test_a_lasting_rise_is_accepted(tmp_path, factor):
    judge = steps(tmp_path)
    assert all(map(judge.accepts, usual(200)))
    after = [judge.accepts(factor * norm) for norm in usual(200, seed=1)]
    assert not after[0] and after.count(False) < 100 and all(after[100:])


def test_norms_that_do_not_vary(tmp_path):
    judge = steps(tmp_path, window=10)
    assert [judge.accepts(norm) for norm in [1.0] * 10 + [1.05, 1.2]] == [True] * 11 + [False]


def test_one_rank_decides_for_all(tmp_path, monkeypatch):
    judge = steps(tmp_path)
    assert all(map(judge.accepts, usual(200)))
    monkeypatch.setattr(distributed, "any_rank", lambda flag: True)
    assert not judge.accepts(1.0)


def spiking(recipe, at: set[int], *overrides: str) -> Trainer:
    """A run of the toy whose gradient is a thousand times as large in some steps."""
    trainer = Trainer(recipe("train.skip_spikes=8", "train.spike_window=8", *overrides), ToyAdapter())
    loss = trainer.adapter.loss

    def scaled(batch, features, rng):
        term = loss(batch, features, rng)
        return term._replace(sum=term.sum * (1000 if trainer.step in at else 1))

    trainer.adapter.loss = scaled
    trainer.run()
    return trainer


def test_a_spike_is_skipped_counted_and_written_down(recipe, tmp_path, caplog):
    trainer = spiking(recipe, {6, 9}, "train.steps=12")
    folder = trainer.run_dir
    dump = [json.loads(line) for line in (folder / "spikes_0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in dump] == [7, 10] and len(set(dump[0]["sample_ids"]["reca"])) == 8
    assert dump[0]["grad_norm"] > 100 and not (folder / "non_finite_0.jsonl").exists()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0] * 6 + [1] * 3 + [2] * 3
    assert [line["step"] for line in lines if line["grad_norm"] > 100] == [7, 10]
    assert "step 7 skipped: gradient norm" in caplog.text and "standard deviations above" in caplog.text
    # The same steps with their usual gradients are other weights: two updates are missing.
    plain = run_toy(recipe(f"run_dir={tmp_path}/plain", "train.steps=12"))
    assert not all(torch.equal(v, weights(trainer.adapter)[n]) for n, v in weights(plain.adapter).items())


def test_a_file_of_samples_that_cannot_be_opened_does_not_end_the_run(recipe, caplog):
    """A disk without inodes, or over its quota of files: the run's other files are open, and it went on until then."""
    run_dir = Path(recipe().run_dir)
    (run_dir / "spikes_0.jsonl").mkdir(parents=True)
    trainer = spiking(recipe, {6}, "train.steps=8")
    assert trainer.step == 8 and f"{run_dir}/spikes_0.jsonl cannot be written (Is a directory)" in caplog.text


def test_a_run_that_goes_on_skips_the_same(recipe, tmp_path):
    whole = spiking(recipe, {6, 9}, "train.steps=12", f"run_dir={tmp_path}/whole")
    for end in (3, 7, 8, 12):
        parts = spiking(recipe, {6, 9}, f"train.steps={end}", f"run_dir={tmp_path}/parts")
    assert all(torch.equal(v, weights(parts.adapter)[n]) for n, v in weights(whole.adapter).items())
    ends = [checkpoint.read_state(checkpoint.latest(t.run_dir))["skipped"] for t in (whole, parts)]
    assert ends[0] == ends[1] and ends[0]["total"] == 2 and len(ends[0]["norms"]) == 8


def test_what_is_advised_after_steps_that_are_not_finite_can_be_done(recipe, tmp_path):
    """The run itself refuses another learning rate."""
    broken = Trainer(recipe("checkpoint.every=1", "train.max_skips=0"), ToyAdapter())
    usual = broken.adapter.loss
    broken.adapter.loss = lambda *given: (t := usual(*given))._replace(sum=t.sum * (math.nan if broken.step else 1))
    with pytest.raises(NonFiniteError, match=rf"in another run_dir. .* train\.init_from={broken.run_dir} takes over"):
        broken.run()
    with pytest.raises(RecipeError, match=r"optim.lr 0.01 -> 0.001.* Set another run_dir"):
        run_toy(recipe("optim.lr=0.001"))
    advised = f"run_dir={tmp_path}/next", f"train.init_from={broken.run_dir}", "train.steps=1", "optim.lr=0.001"
    assert run_toy(recipe(*advised)).step == 1


def test_steps_that_are_made_again_are_listed_once(recipe, tmp_path):
    """Two of four ranks have skipped steps behind the checkpoint, and the run goes on alone."""
    spiking(recipe, {6}, "train.steps=8")
    for rank in (0, 3):
        with (tmp_path / f"run/spikes_{rank}.jsonl").open("a") as file:
            file.write('{"step": 10}\n')
    trainer = spiking(recipe, {6, 9}, "train.steps=12")
    dumps = {path.name: jsonl.read(path) for path in trainer.run_dir.glob("spikes_*.jsonl")}
    assert {name: [line["step"] for line in lines] for name, lines in dumps.items()} == {
        "spikes_0.jsonl": [7, 10], "spikes_3.jsonl": [],
    }  # fmt: skip
