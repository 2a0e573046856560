"""`reca compare` and the folders that it reads: which evaluation of a run it takes."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from reca import checkpoint
from reca.cli import main
from reca.comparison import triplets
from reca.comparison.build import _suites, compare
from reca.comparison.curves import loss_curves
from reca.comparison.sides import find_sides
from reca.comparison.weights import understanding
from reca.config.recipe_files import load_recipe, save_recipe
from reca.eval.errors import EvaluationError
from reca.eval.report import FORMAT
from tests.driver.toy import write_images


def evaluation(folder, value, suite="geneval", protocol="GenEval", model=None):
    """Write results of two prompts, with the images' values."""
    items = [
        {"item": str(n), "tag": "t", "prompt": f"p{n}", "value": value,
         "images": [{"k": 0, "path": None, "value": value, "reason": ""}]}
        for n in range(2)
    ]  # fmt: skip
    interval = {"value": value, "interval": [value, value]}
    found = {
        "format": FORMAT, "suite": suite, "protocol": protocol, "sampling": None,
        "model": model and {"source": "r", **model},
        "images_per_item": 1, "counts": {"items": 2, "images": 2, "failed": 0, "missing": 0}, "judge": {"name": "rule"},
        "overall": {**interval, "unit": "fraction"},
        "weights": {"t": 1.0}, "tags": {"t": interval}, "items": items, "against": None, "power": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))


def test_images_that_have_changed_are_drawn_anew(tmp_path, monkeypatch):
    photos, run = tmp_path / "photos", tmp_path / "run"
    write_images(photos, 2)
    keys = {"run_dir": str(run), "data.images": str(photos)}
    run.mkdir()
    save_recipe(load_recipe("show_o_tiny", keys), run / "recipe.yaml")
    (run / "checkpoints/000001").mkdir(parents=True)
    (run / "checkpoints/000001" / checkpoint.MARKER).write_text("of the weights")
    drawn = []

    def stub(targets, recipe, source, *_):
        drawn.append([source.key(i) for i in range(len(source))])
        return [], [target.fingerprint() for target in targets]

    monkeypatch.setattr(triplets, "_draw", stub)
    for images in (str(photos), None):
        draw = functools.partial(triplets.draw, "base", str(run), tmp_path / f"out {images is None}", images=images)
        drawn.clear()
        draw()
        draw()
        assert len(drawn) == 1
        (photos / "000.png").write_bytes((photos / "000.png").read_bytes() + b"other")
        draw()
        draw()
        assert len(drawn) == 2
        write_images(photos, 3 if images else 4)
        draw()
        assert len(drawn) == 3 and len(drawn[2]) == (3 if images else 4)
    moved = str(photos.rename(tmp_path / "moved"))
    save_recipe(load_recipe("show_o_tiny", keys | {"data.images": moved}), run / "recipe.yaml")
    assert draw()["pictures"] == "training" and len(drawn) == 3
    found = triplets.draw("base", str(run), tmp_path / "out True", images=moved)  # the same images, given
    assert (found["pictures"], found["source"]) == ("given", moved) and len(drawn) == 3


def test_reconstructions_record_the_checkpoint_that_was_loaded(tmp_path, monkeypatch):
    """A run that goes on saves another one between the start and the loading."""
    write_images(tmp_path / "photos", 1)
    run = tmp_path / "run"
    folder = run / "checkpoints/000001"
    folder.mkdir(parents=True)
    (folder / checkpoint.MARKER).write_text("of the weights")
    save_recipe(load_recipe("show_o_tiny", {"run_dir": run}), run / "recipe.yaml")
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(triplets.Target, "load", lambda *_: SimpleNamespace(state={"digest": "of another"}))
    batch = SimpleNamespace(gen=[picture])
    monkeypatch.setattr(triplets, "named_images", lambda *_: (["a"], batch))
    monkeypatch.setattr(triplets, "reconstruct", lambda *_, **__: [picture])
    triplets.draw("base", str(run), tmp_path / "out", 1, str(tmp_path / "photos"))
    found = json.loads((tmp_path / "out/reconstructions/made.json").read_text())
    assert found["of"][0][1]["checkpoint"] == "of another"


def test_reconstructions_whose_file_lacks_something_are_made_again(tmp_path):
    place, row = (
        tmp_path / "reconstructions",
        {name: f"reconstructions/{name}" for name in ("input", "before", "after")},
    )
    place.mkdir()
    for name in row:
        (place / name).touch()
    row, models = row | {"name": "a"}, [1]

    def made(found):
        (place / "made.json").write_text(json.dumps(found))
        return triplets._made(place, models)

    assert made({"of": models, "made": [row]}) == [row] and made({"of": [2], "made": [row]}) is None
    for found in ([], {"made": [row]}, {"of": models}, {"of": models, "made": row}, {"of": models, "made": [1]}):
        assert made(found) is None
    for name in row:
        assert made({"of": models, "made": [row | {name: None}]}) is None


def test_the_evaluation_that_is_named_after_its_suite_is_compared(tmp_path):
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    evaluation(tmp_path / "eval/base/geneval", 0.5)
    for name, value in (("a", 0.0), ("geneval", 1.0), ("geneval_ema", 0.0)):
        evaluation(tmp_path / "eval/000008" / name, value)
    evaluation(tmp_path / "eval/000008/other", 0.0, protocol="GenEval of other prompts")
    found = compare("base", str(tmp_path))
    (suite,) = found["suites"]
    assert suite["overall"]["value"] == 1.0 and suite["against"]["overall"]["value"] == 0.5
    alone, *left_out = found["notes"]
    assert (
        alone == f"geneval was evaluated for {tmp_path} only; run reca eval geneval for the other model to compare it"
    )
    assert [note.split(" is ignored")[0] for note in left_out] == [
        str(tmp_path / "eval/000008" / name) for name in ("a", "geneval_ema")
    ]
    (tmp_path / "eval/000008/geneval/results.json").unlink()
    (suite,) = compare("base", str(tmp_path))["suites"]
    assert suite["overall"]["value"] == 0.0


def test_runs_are_compared_without_evaluations_and_evaluations_of_other_suites_are_not(tmp_path):
    run = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    save_recipe(load_recipe("show_o_tiny", {"run_dir": run}), tmp_path / "run/recipe.yaml")
    found = compare("base", run)
    assert not found["suites"] and found["notes"][0].startswith("neither model was evaluated; run reca eval SUITE RUN")
    for suite in ("geneval", "dpg"):
        evaluation(tmp_path / suite, 1.0, suite)
    with pytest.raises(EvaluationError, match="have no results to compare: dpg was evaluated for .*dpg only;"):
        compare(str(tmp_path / "dpg"), str(tmp_path / "geneval"))


def test_base_may_be_either_side_and_not_both(tmp_path):
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    assert [side.kind for side in find_sides("base", str(tmp_path))] == ["base", "run"]
    assert [side.kind for side in find_sides(str(tmp_path), "base")] == ["run", "base"]
    assert [side.lacks_weights for side in find_sides("base", str(tmp_path))] == [False, True]
    with pytest.raises(ValueError, match="both sides are base: pass a run on one side"):
        find_sides("base", "base")


def test_a_run_is_compared_by_the_evaluations_of_its_newest_checkpoint(tmp_path):
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    for step in (4, 8):
        (tmp_path / f"checkpoints/{step:06}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step:06}" / checkpoint.MARKER).write_text("of the weights")
    evaluation(tmp_path / "eval/base/geneval", 0.5, model={"step": None})
    evaluation(tmp_path / "eval/000004/geneval", 1.0, model={"step": 4})
    (tmp_path / "eval/000006/geneval").mkdir(parents=True)  # of an evaluation that failed at its start
    sides = find_sides("base", str(tmp_path))
    suites, notes = _suites(*sides)
    assert not suites and len(notes) == 2 and not any(side.lacks_weights for side in sides)
    assert notes[1].startswith(f"{tmp_path} stands for step 8, which was not evaluated, but other steps were: ")
    assert notes[1].endswith(f"in {tmp_path}/eval (000004)")
    (suite,), notes = _suites(*find_sides("base", str(tmp_path / "checkpoints/000004")))
    assert suite["model"]["step"] == 4 and not notes
    evaluation(tmp_path / "eval/000008/geneval", 1.0, model={"step": 8})
    for name in (tmp_path, tmp_path / "checkpoints/000008"):
        (suite,), notes = _suites(*find_sides("base", str(name)))
        assert suite["model"]["step"] == 8 and not notes


def test_the_curve_of_an_earlier_checkpoint_ends_at_its_step(tmp_path):
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {n}, "reca/loss": {n}.5}}\n' for n in (4, 6, 8)))
    for step in (4, 6):
        (tmp_path / f"checkpoints/{step:06}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step:06}" / checkpoint.MARKER).write_text("of the weights")
    (curve,) = loss_curves(*find_sides(str(tmp_path / "checkpoints/000004"), str(tmp_path)))
    assert curve == {"name": "reca/loss", "before": [[4, 4.5]], "after": [[4, 4.5], [6, 6.5], [8, 8.5]]}


def test_a_model_is_not_compared_with_itself(tmp_path):
    evaluation(tmp_path / "a", 1.0)
    (tmp_path / "b").mkdir()
    with pytest.raises(EvaluationError, match="both sides are .*: pass two models, or base as one side"):
        compare(str(tmp_path / "a"), f"{tmp_path}/b/../a")
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    newest = tmp_path / "checkpoints/000004"
    newest.mkdir(parents=True)
    (newest / checkpoint.MARKER).write_text("of the weights")
    with pytest.raises(EvaluationError, match=f"both sides are {newest}: pass two models, or base as one side"):
        compare(str(newest), str(tmp_path))


def test_a_checkpoint_that_is_gone_names_those_that_there_are(tmp_path):
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    (tmp_path / "checkpoints/000004").mkdir(parents=True)
    (tmp_path / "checkpoints/000004" / checkpoint.MARKER).write_text("of the weights")
    for before in ("base", str(tmp_path)):
        with pytest.raises(EvaluationError, match=r"000002 is inside the run folder .* \(there are: 000004\)"):
            compare(before, str(tmp_path / "checkpoints/000002"))


def test_a_base_whose_parent_is_gone_is_not_taken_for_the_published_model(tmp_path):
    """Its weights were compared with random ones, and loading it said that there is no recipe of this name."""
    run, keys = tmp_path / "run", {"run_dir": f"{tmp_path}/run", "train.init_from": f"{tmp_path}/gone"}
    (run / "checkpoints/000004").mkdir(parents=True)
    (run / "checkpoints/000004" / checkpoint.MARKER).write_text("of the weights")
    (run / "checkpoints/000004/state.json").write_text(json.dumps({"fingerprint": {"train.init_from": "a digest"}}))
    save_recipe(load_recipe("show_o_tiny", keys), run / "recipe.yaml")
    sides = find_sides("base", str(run))
    assert understanding(*sides) is None and triplets.usual_count("base", str(run)) == 0
    not_evaluated, note = _suites(*sides)[1]
    assert "neither model was evaluated" in not_evaluated
    assert note.startswith(f"the weights of base of {run} are not compared: train.init_from={tmp_path}/gone has no")


def test_evaluations_during_training_are_compared_where_reca_eval_has_not_measured_both(tmp_path):
    run = str(tmp_path)
    save_recipe(load_recipe("show_o_tiny", {"run_dir": run}), tmp_path / "recipe.yaml")
    for step in (4, 8):
        (tmp_path / f"checkpoints/{step:06}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step:06}" / checkpoint.MARKER).write_text("of the weights")

    def during(step, value):
        model = {"source": run, "step": step, "ema": False}
        evaluation(tmp_path / f"eval/training/geneval/{step:06}", value, model=model)

    during(0, 0.5)
    during(4, 0.75)
    assert not _suites(*find_sides("base", run))[0]
    assert _suites(*find_sides("base", run))[1][-1].endswith(f"in {run}/eval (training/geneval/000004)")
    (suite,), notes = _suites(*find_sides("base", str(tmp_path / "checkpoints/000004")))
    assert (suite["overall"]["value"], suite["against"]["overall"]["value"], notes) == (0.75, 0.5, [])
    during(8, 1.0)
    evaluation(tmp_path / "eval/000008/geneval", 0.0, model={"source": run, "step": 8})  # of base there is none
    (suite,), notes = _suites(*find_sides("base", run))
    assert suite["overall"]["value"] == 1.0 and not notes
    at = "evaluated during training"
    assert suite["of"] == {"before": f"{run}, step 0, {at}", "after": f"{run}, step 8, {at}"}
    evaluation(tmp_path / "eval/base/geneval", 0.25, model={"source": "base of it", "step": None})
    (suite,), notes = _suites(*find_sides("base", run))
    assert (suite["overall"]["value"], suite["against"]["overall"]["value"], notes) == (0.0, 0.25, [])


def test_a_suite_that_one_model_has_only_from_its_training_is_named(tmp_path):
    for name, folder in (("a", "eval/000008/geneval"), ("b", "eval/training/geneval/000008")):
        save_recipe(load_recipe("show_o_tiny", {"run_dir": f"{tmp_path}/{name}"}), tmp_path / "recipe.yaml")
        (tmp_path / f"{name}/checkpoints/000008").mkdir(parents=True)
        (tmp_path / "recipe.yaml").rename(tmp_path / name / "recipe.yaml")
        (tmp_path / f"{name}/checkpoints/000008" / checkpoint.MARKER).write_text(f"of {name}")
        evaluation(tmp_path / name / folder, 1.0, model={"source": name, "step": 8})
    suites, notes = _suites(*find_sides(f"{tmp_path}/a", f"{tmp_path}/b"))
    assert not suites and notes == [
        f"geneval was evaluated for {tmp_path}/b only during training; run reca eval geneval for it to compare it with "
        "that of the other model"
    ]


def test_scores_of_a_moving_average_are_named(tmp_path, capsys):
    save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path)}), tmp_path / "recipe.yaml")
    evaluation(tmp_path / "eval/base/geneval", 0.5, model={"source": "base of r", "step": None, "weights_sha256": "0"})
    model = {"source": "r", "step": 8, "ema": True, "weights_sha256": "1"}
    evaluation(tmp_path / "eval/000008/geneval_ema", 1.0, model=model)
    assert main(["compare", "base", str(tmp_path)]) == 0
    assert "\n  base of r -> r, step 8, moving average of the weights\n" in capsys.readouterr().out
    page = (tmp_path / "comparison/comparison.html").read_text()
    assert "<br>after: r, step 8, moving average of the weights</p>" in page
