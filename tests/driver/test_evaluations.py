"""Evaluation while a run goes on: what is written, that it changes nothing of the training, and alarms."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from reca import exits
from reca.config.recipe_files import load_recipe
from reca.eval.config import EvalConfig
from reca.eval.judges.toy import ToyJudge
from reca.monitoring.alarms import Alarms, spread
from reca.options.fields import RecipeError
from reca.precision import _matmul_precision
from reca.runs.status import Status
from reca.trainer import CollapseError, Trainer
from tests.driver.toy import ToyAdapter, run_toy, weights

PROMPTS = "log.prompts=[a red square, a blue circle]"


class Reconstructing(ToyAdapter):
    """A toy that reconstructs, too: every image as it is, but for a pixel."""

    def reconstruct(self, batch, seeds, **sampling):
        return [image * 0 + 7 for image in batch.gen]


def lines(run_dir: Path, key: str = "evaluation") -> list[dict]:
    return [row for line in (run_dir / "log.jsonl").read_text().splitlines() if key in (row := json.loads(line))]


def test_it_comes_before_the_first_step_every_so_many_and_after_the_last(recipe, capsys):
    keys = ["eval.every=4", "eval.holdout=4", PROMPTS, "log.tensorboard=true"]
    trainer = run_toy(recipe(*keys))
    found = lines(trainer.run_dir)
    assert [line["step"] for line in found] == [0, 4, 6]
    for line in found:
        assert {"holdout/loss", "holdout/gap", "samples/contrast", "samples/variety", "alarms"} <= line.keys()
    assert found[0]["samples/contrast"] == 0 and found[0]["samples/variety"] == pytest.approx(0.5)  # seeds 0 and 1
    assert found[0]["holdout/loss"] > found[2]["holdout/loss"]
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation")]
    assert len(shown) == 3 and "step 4/6  holdout/loss" in shown[1] and shown[1].endswith(" s")
    assert all(0 <= float(line.split()[-2]) < 100 for line in shown)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trainer.run_dir / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("holdout/loss")] == [0, 4, 6]


def test_where_memory_may_end_the_run_a_step_is_saved_before_its_evaluation(recipe, monkeypatch):
    """Once: the checkpoint that is due is that one."""
    monkeypatch.setattr("reca.inference.shares_weights", lambda _: True)
    trainer, done = Trainer(recipe("eval.every=2", "checkpoint.every=3", PROMPTS), ToyAdapter()), []
    save, evaluate = trainer.save, trainer.evaluations.run
    trainer.save = lambda *given: done.append(("save", trainer.step)) or save(*given)
    trainer.evaluations.run = lambda step: done.append(("evaluate", step)) or evaluate(step)
    trainer.run()
    evaluated = [("evaluate", step) for step in (0, 2, 4, 6)]
    assert done == [*evaluated[:2], ("save", 3), evaluated[2], ("save", 6), evaluated[3]]


def test_a_run_that_goes_on_keeps_what_it_compares_with(recipe):
    keys = ["eval.every=2", "eval.holdout=4"]
    whole = run_toy(recipe(*keys, "train.steps=4"))
    first = lines(whole.run_dir)
    again = run_toy(recipe(*keys))
    assert [line["step"] for line in lines(again.run_dir)] == [0, 2, 4, 6]
    assert lines(again.run_dir)[:3] == first
    assert again.evaluations.alarms.first["holdout/loss"] == first[0]["holdout/loss"]


@pytest.mark.parametrize("line", ['{"evaluation": true}', '{"step": "1", "evaluation": true}'])
def test_a_damaged_line_of_the_log_is_no_evaluation(line, recipe):
    keys = ["eval.every=2", "eval.holdout=4"]
    whole = run_toy(recipe(*keys, "train.steps=4"))
    first = lines(whole.run_dir)
    with (whole.run_dir / "log.jsonl").open("a") as log:
        log.write(line + "\n")
    again = run_toy(recipe(*keys))
    assert lines(again.run_dir)[:3] == first and len(lines(again.run_dir)) == 4


def test_all_ranks_go_by_the_values_of_the_first(recipe, monkeypatch):
    """Ranks with other values would raise other alarms, and some would end the run alone."""
    evaluations = Trainer(recipe("eval.every=2"), ToyAdapter()).evaluations  # of which this rank measures nothing
    first = ({"holdout/loss": 7.0}, ["no score of toy (it failed); training continues"])
    monkeypatch.setattr("reca.monitoring.evaluations.distributed.all_gather", lambda mine: [first, mine])
    found = evaluations.run(0)
    assert (found.values, found.failed) == first and evaluations.alarms.first["holdout/loss"] == 7.0


def test_one_that_is_asked_for_later_begins_where_it_is(recipe):
    run_toy(recipe("train.steps=2"))
    trainer = run_toy(recipe("eval.every=4", PROMPTS))
    assert [line["step"] for line in lines(trainer.run_dir)] == [2, 4, 6]


def test_it_changes_no_bit_of_the_training(tmp_path):
    """Neither the suite of the toy dataset, nor held-out images of elsewhere, nor reconstructions; dropout is on."""
    keys = ["train.steps=2", "log.tensorboard=false", "data.workers=0", "train.threads=1", "log.every=1"]
    keys += ["objective.reca.batch_size=4", "objective.i2t.batch_size=2", "lora.rank=2", "lora.dropout=0.2"]
    more = [
        "eval.every=1",
        "eval.holdout=3",
        "eval.holdout_from=reca.toy_datasets.shapes:unlabeled?seed=5",
        "eval.suite=toy",
    ]
    more += ["eval.prompts=3", "log.sample_every=1", "log.reconstructions=2", PROMPTS, "eval.sampling=[steps=2]"]
    made = []
    for name, others in (("plain", []), ("evaluated", more)):
        trainer = Trainer(load_recipe("show_o_tiny", [*keys, *others, f"run_dir={tmp_path}/{name}"]))
        trainer.run()
        made.append(weights(trainer.adapter))
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())
    losses = [[line["loss"] for line in lines(tmp_path / name, "loss")] for name in ("plain", "evaluated")]
    assert losses[0] == losses[1]
    found = lines(tmp_path / "evaluated")
    assert [line["step"] for line in found] == [0, 1, 2]
    assert {"toy/score", "toy/score_low", "toy/change", "samples/contrast"} <= found[1].keys()
    for step in ("000000", "000002"):
        folder = tmp_path / "evaluated/eval/training/toy" / step
        results = json.loads((folder / "results.json").read_text())
        assert results["counts"]["images"] == 3 and results["model"]["step"] == int(step)
        assert results["sampling"]["steps"] == 2 and len(list(folder.rglob("*.png"))) == 3
    assert "training/toy/000000" in results["against"]["folder"]
    grid = Image.open(tmp_path / "evaluated/samples/000002_reconstructions.png")
    assert grid.size == (2 * 20 + 2, 2 * 20 + 2)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["eval.suite=geneval"], "eval.suite='geneval': geneval needs a judge"),
        (["eval.suite=nothing"], "eval.suite='nothing': there is no suite 'nothing'"),
        (["eval.suite=mme", "eval.suite_data=."], "eval.suite='mme': mme generates no images from prompts"),
        (["eval.suite=toy", "eval.sampling=[stepps=3]"], "did you mean steps"),
    ],
)
def test_a_suite_that_cannot_be_used_is_refused_before_the_run(recipe, keys, said):
    with pytest.raises(RecipeError, match=said):
        Trainer(recipe("eval.every=2", *keys), ToyAdapter())


def test_a_suite_needs_steps_between(recipe):
    with pytest.raises(RecipeError, match=r"eval.suite='toy\\t' needs eval.every"):
        recipe("eval.suite=toy\t")


def test_a_judge_that_fails_ends_nothing(recipe, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("the judge is out of memory")

    monkeypatch.setattr("reca.eval.training.judge_and_score", fail)
    trainer = run_toy(recipe("eval.every=3", "eval.suite=toy", "eval.prompts=2", "eval.holdout=4"))
    assert caplog.text.count("no score of toy (the judge is out of memory); training continues") == 3
    assert all("toy/score" not in line and "holdout/loss" in line for line in lines(trainer.run_dir))


def test_a_judge_computes_as_in_an_evaluation_of_its_own(recipe, monkeypatch):
    """The model draws under the run's autocast and the kernels of training; the judge is under neither."""

    def state() -> tuple[bool, str]:
        return torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()

    def generate(self, prompts, seeds, **sampling):
        found["model"] = state()
        return ToyAdapter.generate(self, prompts, seeds)

    def shows(self, image, prompt):
        found["judge"] = state()
        return {"correct": True, "seen": ""}

    def kernels(*_):
        return _matmul_precision("high")  # as on a GPU

    found: dict[str, tuple[bool, str]] = {}
    monkeypatch.setattr("reca.trainer.training_kernels", kernels)
    monkeypatch.setattr(ToyJudge, "shows", shows)
    adapter = type("Drawing", (ToyAdapter,), {"generate": generate})()
    keys = ["train.precision=bf16", "train.steps=1", "eval.every=1", "eval.suite=toy", "eval.prompts=2"]
    Trainer(recipe(*keys), adapter).run()
    assert found == {"model": (True, "high"), "judge": (False, "highest")}


def test_a_disk_that_is_full_ends_nothing(recipe, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reca.eval.training.write_generation", full)
    trainer = run_toy(recipe("train.steps=2", "eval.every=3", "eval.suite=toy", "eval.prompts=2"))
    assert caplog.text.count("no score of toy ([Errno 28] No space left on device); training continues") == 2
    assert trainer.step == 2


# reconstructions


def test_reconstructions_stand_beside_their_images(recipe):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    r = recipe("log.sample_every=3", "log.tensorboard=true", "eval.holdout=5", "log.reconstructions=3")
    trainer = Trainer(r, Reconstructing())
    trainer.run()
    grids = sorted((trainer.run_dir / "samples").glob("*.png"))
    assert [path.name for path in grids] == ["000003_reconstructions.png", "000006_reconstructions.png"]
    grid = Image.open(grids[1])
    assert grid.size == (2 * 4 + 2, 3 * 4 + 4) and grid.getpixel((7, 0)) == (7, 7, 7)
    events = accumulator.EventAccumulator(str(trainer.run_dir / "tensorboard"), {"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [f"reconstructions/{i} image, reconstruction" for i in range(3)]
    assert [(e.step, e.width, e.height) for e in events.Images(events.Tags()["images"][2])] == [(3, 10, 4), (6, 10, 4)]


# alarms


def check(*values: dict, **keys) -> list[list[str]]:
    alarms = Alarms(EvalConfig(**keys))
    return [alarms.check(step, one) for step, one in enumerate(values)]


def test_a_held_out_loss_above_that_of_the_base():
    found = check(*({"holdout/loss": x, "holdout/gap": 1.0} for x in (2.0, 1.5, 2.1, 2.3, 2.4, 2.0, 2.3)))
    assert [len(new) for new in found] == [0, 0, 0, 1, 0, 0, 1]  # said once until it clears
    assert "2.3, 1.15 times that of step 0 (2" in found[3][0] and "optim.lr" in found[3][0]


def test_an_evaluation_is_compared_with_the_first_that_is_finite():
    nan, inf = float("nan"), float("inf")
    losses = [{"samples/contrast": 1.0}, {"holdout/loss": nan}, *({"holdout/loss": x} for x in (2.0, 2.1, nan))]
    found = check(*losses)
    assert [len(new) for new in found] == [0, 0, 0, 0, 1] and "loss is nan, nan times that of step 2 (2;" in found[4][0]
    assert check(*({"holdout/loss": 1.0, "holdout/gap": x} for x in (inf, 0.5, 0.4))) == [[], [], []]
    assert check({"holdout/loss": 0.0}, {"holdout/loss": 1.0}) == [[], []]  # of which it is no multiple


def test_h_v_that_does_not_help_any_more():
    falling = [{"holdout/loss": 1.0, "holdout/gap": x} for x in (0.1, 0.4, 0.11, 0.09)]
    assert [len(new) for new in check(*falling)] == [0, 0, 0, 1]
    assert "no longer uses h_v and generates an average image" in check(*falling)[3][0]
    never = [{"holdout/loss": 1.0, "holdout/gap": x} for x in (0.001, 0.004, -0.01)]
    assert check(*never) == [[], [], []]  # a model that has not learned it yet


def test_images_that_turn_flat_or_all_alike():
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator) for _ in range(4)]
    flat = [torch.full((3, 32, 32), level, dtype=torch.uint8) for level in (0, 80, 160, 240)]
    found = [spread(images) for images in (noise, [noise[0]] * 4, flat, [flat[1]] * 4)]
    assert [one["samples/contrast"] > 70 for one in found] == [True, True, False, False]
    assert [one["samples/variety"] > 15 for one in found] == [True, False, True, False]
    assert "become uniform" in check(found[0], found[2])[1][0]
    assert "become identical" in check(found[0], found[1])[1][0]
    assert check(found[3], found[0]) == [[], []] and spread([]) == {}
    assert spread([noise[0][:, :20], noise[1]]).keys() == found[0].keys()  # of different sizes


def test_variety_compares_parts_of_images_not_their_pixels():
    """Noise of 32 pixels is averaged over 2 x 2, which halves its standard deviation; a pattern of 16 parts stays."""
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(16)]
    fine = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator) for _ in range(16)]
    larger = [image.repeat_interleave(2, 1).repeat_interleave(2, 2) for image in coarse]
    found = [spread(images)["samples/variety"] for images in (coarse, larger, fine)]
    assert 65 < found[0] == found[1] and found[2] == pytest.approx(found[0] / 2, rel=0.05)


class Forgetting(ToyAdapter):
    """Forgets what it has learned after its second update."""

    def loss(self, prepared, features, rng):
        term = super().loss(prepared, features, rng)
        late = not self.training and len(self.seen) > 40
        return term._replace(sum=term.sum * 3) if late else term


def test_an_alarm_is_said_and_stands_in_the_status(recipe, caplog):
    trainer = Trainer(recipe("eval.every=2", "eval.holdout=4"), Forgetting())
    trainer.run()
    status = Status.read(trainer.run_dir)
    assert status.state == "finished" and "held-out reconstruction loss" in status.alarm
    assert caplog.text.count("alarm: the held-out reconstruction loss is") == 1
    assert [bool(line["alarms"]) for line in lines(trainer.run_dir)] == [False, False, True, True]
    assert len(lines(trainer.run_dir, "warning")) == 1


def test_an_alarm_of_the_last_evaluation_is_not_said_again_by_a_resumed_run(recipe, caplog):
    keys = ["eval.every=2", "eval.holdout=4"]
    Trainer(recipe(*keys, "train.steps=4"), Forgetting()).run()
    assert caplog.text.count("alarm: the held-out") == 1
    resumed = Forgetting()
    resumed.seen = [0] * 41
    Trainer(recipe(*keys), resumed).run()
    assert caplog.text.count("alarm: the held-out") == 1
    assert [bool(line["alarms"]) for line in lines(Path(recipe().run_dir))] == [False, False, True, True]


def test_an_alarm_can_end_the_run(recipe):
    r = recipe("eval.every=2", "eval.holdout=4", "eval.stop_on_alarm=true")
    with pytest.raises(CollapseError, match=r"stopped at step 4 by an alarm: the held-out .* eval.stop_on_alarm=false"):
        Trainer(r, Forgetting()).run()
    status = Status.read(Path(r.run_dir))
    assert (status.state, status.exit_code, status.step) == ("failed", exits.NOT_LEARNING, 4)
    r.eval.stop_on_alarm = False
    assert run_toy(r).step == 6
