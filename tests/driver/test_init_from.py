"""Runs that start from another run need it at their first start only."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reca
from reca import checkpoint, trainer
from reca.checkpoint import CheckpointError, listing, writing
from reca.comparison.sides import find_sides
from reca.config.recipe_files import load_recipe, save_recipe
from reca.eval.targets import opponent, target
from reca.options.fields import RecipeError
from reca.runs import lineage
from reca.runs.lineage import load_start, load_trained, parent_checkpoint
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy, weights

FIRST = ["objective.reca.weight=0", "objective.t2i.weight=1", "train.frozen=['layers.0.*']"]
SECOND = ["train.frozen=['layers.1.*']"]


@pytest.fixture
def published(monkeypatch):
    """`load` reads the toy's published weights."""
    package = SimpleNamespace(Adapter=SimpleNamespace(load=lambda *_: ToyAdapter()))
    monkeypatch.setattr("reca.runs.lineage.umm_package", lambda _: package)


@pytest.fixture
def start(recipe, tmp_path):
    """The recipe of a run tmp_path/name that begins where `before` ended."""

    def start(name: str, before: str | None, *overrides: str):
        init = [] if before is None else [f"train.init_from={tmp_path / before}"]
        return recipe(f"run_dir={tmp_path / name}", "train.steps=2", *init, *overrides)

    return start


def equal(a: dict, b: dict, part: str = "") -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items() if name.startswith(part))


@pytest.mark.parametrize("fate", ["trains on", "goes", "moves", "is damaged"])
def test_the_run_before_may_change_once_the_next_has_begun(fate, start, tmp_path, published):
    """Its layer, which the second run freezes, stays what it was when that began."""
    first = weights(run_toy(start("first", None, *FIRST)).adapter)
    cached = [*SECOND, f"data.cache={tmp_path}/features"]
    second = run_toy(start("second", "first", *cached))
    assert equal(weights(second.adapter), first, "layers.1") and not equal(weights(second.adapter), first, "layers.0")

    if fate == "trains on":
        changed = run_toy(start("first", None, *FIRST, "train.steps=4", "checkpoint.keep=1"))
        assert not equal(weights(changed.adapter), first, "layers.1")
    elif fate == "goes":
        shutil.rmtree(tmp_path / "first")
    elif fate == "moves":
        (tmp_path / "first").rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(tmp_path / "first/checkpoints")
    loaded = load_trained(second.run_dir, second.recipe)
    assert equal(weights(second.adapter), weights(loaded))
    resumed = run_toy(start("second", "first", *cached, "train.steps=4"))
    assert resumed.step == 4 and equal(weights(resumed.adapter), first, "layers.1")
    assert resumed.features == second.features and second.features[-1] is not None  # it goes on with its cache


def test_a_chain_of_three(start, tmp_path, published):
    """The third trains what the second did; the first one's layer comes through both, also when they are gone."""
    first = weights(run_toy(start("first", None, *FIRST)).adapter)
    run_toy(start("second", "first", *SECOND))
    shutil.rmtree(tmp_path / "first")
    third = run_toy(start("third", "second", *SECOND))
    shutil.rmtree(tmp_path / "second")
    assert equal(weights(third.adapter), first, "layers.1")
    assert equal(weights(load_trained(third.run_dir, third.recipe)), weights(third.adapter))
    assert set(checkpoint.changed_parameters(third.adapter)) == {
        n for n in weights(third.adapter) if n.startswith("layers")
    }


def test_a_run_does_not_start_from_itself(start):
    with pytest.raises(RecipeError, match="is not a run folder"):
        Trainer(start("run", "run"), ToyAdapter())
    run_toy(start("run", None))
    with pytest.raises(RecipeError, match="train.init_from None -> .* has other contents"):
        Trainer(start("run", "run"), ToyAdapter())


def test_a_run_goes_on_from_where_it_began(start, tmp_path, monkeypatch):
    monkeypatch.setattr("reca.api._check_class", lambda *_: None)
    run_toy(start("first", None, *FIRST))
    run_toy(start("other", None, *FIRST, "train.seed=1"))
    run_toy(start("second", "first", *SECOND))
    for before in (None, "other", "nowhere"):
        for steps in (4, 2):  # also if nothing is left to do
            with pytest.raises(RecipeError, match="train.init_from .* -> .* not the checkpoint that the run started"):
                reca.train(start("second", before, *SECOND, f"train.steps={steps}"), model=ToyAdapter())
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    Trainer(start("second", "copy", *SECOND, "train.steps=4"), ToyAdapter())


def test_a_run_goes_on_from_a_folder_that_is_gone_by_any_name_of_it(recipe, tmp_path, monkeypatch):
    """That in the run's own recipe.yaml is absolute."""
    monkeypatch.chdir(tmp_path)
    run_toy(recipe("run_dir=first", "train.steps=1"))
    second = run_toy(recipe("run_dir=second", "train.init_from=first", "train.steps=1"))
    shutil.rmtree(tmp_path / "first")
    again = load_recipe(tmp_path / "second/recipe.yaml", ["train.steps=2"])
    assert Path(again.train.init_from).is_absolute() and run_toy(again).step == 2
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path / "first", f"{tmp_path.name}/first"):
        resumed = run_toy(recipe(f"run_dir={tmp_path}/second", f"train.init_from={folder}", "train.steps=3"))
        assert resumed.fingerprint == second.fingerprint


def test_another_model_is_seen_before_weights_are_read(start, monkeypatch):
    run_toy(start("first", None))
    narrow = ToyAdapter()
    narrow.layers[0] = torch.nn.Linear(48, 47)
    monkeypatch.setattr("reca.runs.lineage.load_parent", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="2 of its parameters"):
        Trainer(start("second", "first"), narrow)


def test_a_run_starts_from_one_that_is_going_on(start, tmp_path):
    """Checkpoints that a live run removes meanwhile are not taken for damaged ones."""
    run_toy(start("first", None, "checkpoint.every=1"))
    damage = listing.find_damage

    def removes(folder: Path, contents: bool = True) -> str:
        if folder.name == "000002":
            folder.rename(folder.with_name("000003"))
        return damage(folder, contents)

    listing.find_damage = removes
    try:
        assert checkpoint.latest_valid(tmp_path / "first") == tmp_path / "first/checkpoints/000003"
    finally:
        listing.find_damage = damage


def test_a_checkpoint_that_a_live_run_has_removed_is_said_to_be_removed(start, tmp_path):
    """An evaluation chooses one before it builds the model; its run was said to have no checkpoint."""
    newest = checkpoint.latest(run_toy(start("first", None, "checkpoint.every=1")).run_dir)
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match=f"^{newest} was removed by a training run while it was read: start aga"):
        lineage._find_valid(newest)
    assert lineage._find_valid(tmp_path / "first") == newest.with_name("000001")


def test_a_file_of_another_hand_is_named(start, caplog):
    """Copies by way of other systems bring ._NAME along."""
    folder = checkpoint.latest(run_toy(start("run", None)).run_dir)
    stranger = folder / "weights/._shard.safetensors"
    stranger.write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"contains \._shard\.safetensors, which is not part of this checkpoint"):
        Trainer(start("run", None), ToyAdapter())
    stranger.unlink()
    assert Trainer(start("run", None), ToyAdapter()).step == 2 and "DAMAGED" not in caplog.text


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(start, monkeypatch, caplog):
    def busy(_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(writing, "remove", busy)
    trainer = run_toy(start("run", None, "checkpoint.every=1", "checkpoint.keep=1"))
    assert "cannot be removed (Device or resource busy)" in caplog.text
    assert json.loads((trainer.run_dir / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("fate", ["is saved", "is found to be damaged"])
def test_a_run_records_the_checkpoint_that_it_has_loaded(fate, start, tmp_path, monkeypatch):
    """The newest one of a run that goes on is another one when weights are read than when data are opened."""
    run_toy(start("first", None, *FIRST, "checkpoint.every=1"))
    began = tmp_path / "first/checkpoints/000002"

    def goes_on(*given):
        nonlocal began
        trainer.choose_trained = choose_trained
        if fate == "is saved":
            run_toy(start("first", None, *FIRST, "train.steps=4"))
            began = began.with_name("000004")
        else:
            (began / "state.json").write_text("{}")
            began = began.with_name("000001")
        return choose_trained(*given)

    choose_trained = trainer.choose_trained
    monkeypatch.setattr(trainer, "choose_trained", goes_on)
    second = Trainer(start("second", "first", *SECOND), ToyAdapter())
    loaded = ToyAdapter()
    checkpoint.load_weights(began, loaded)
    assert equal(weights(second.adapter), weights(loaded))
    assert second.fingerprint["train.init_from"] == checkpoint.digest(began)
    second.run()
    assert parent_checkpoint(second.recipe, second.run_dir) == began


@pytest.mark.parametrize("counters", ["{", "{}"])
def test_the_base_of_a_run_whose_newest_checkpoint_is_damaged(counters, start, tmp_path):
    """Any checkpoint of the run tells what it started from."""
    run_toy(start("first", None, *FIRST))
    second = run_toy(start("second", "first", *SECOND, "checkpoint.every=1"))
    run_toy(start("first", None, *FIRST, "train.steps=4", "checkpoint.keep=2"))
    (second.run_dir / "checkpoints/000002/state.json").write_text(counters)
    assert parent_checkpoint(second.recipe, second.run_dir) == tmp_path / "first/checkpoints/000002"
    (second.run_dir / "checkpoints/000001/state.json").write_text("{")
    (second.run_dir / "checkpoints/000002/state.json").write_text("{")
    with pytest.raises(CheckpointError, match="second/checkpoints/000002 is damaged"):
        parent_checkpoint(second.recipe, second.run_dir)


def test_the_base_of_a_run_is_the_checkpoint_that_it_started_from(start, tmp_path, published):
    first = run_toy(start("first", None, *FIRST))
    began = weights(first.adapter)
    second = run_toy(start("second", "first"))
    mine = target(second.run_dir, (), "toy", None)
    of_the_start = opponent("base", mine, (), "toy").fingerprint()
    trained = run_toy(start("first", None, *FIRST, "train.steps=4", "checkpoint.keep=2"))
    assert not equal(weights(trained.adapter), began)

    assert equal(weights(load_start(second.recipe, run_dir=second.run_dir)), began)
    assert find_sides("base", str(second.run_dir))[0].step == 2
    assert opponent("base", mine, (), "toy").fingerprint() == of_the_start
    of_new_runs = target(tmp_path / "second/recipe.yaml", (), "toy", None)
    assert of_new_runs.fingerprint() != of_the_start
    assert equal(weights(of_new_runs.load("cpu")), weights(trained.adapter))

    shutil.rmtree(tmp_path / "first/checkpoints/000002")
    assert find_sides("base", str(second.run_dir))[0].lacks_weights
    with pytest.raises(CheckpointError, match=r"first no longer contains the checkpoint that .*second started from"):
        load_start(second.recipe, run_dir=second.run_dir)
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match=r"first is not a run folder: it has no recipe.yaml. If the run was moved"):
        load_start(second.recipe, run_dir=second.run_dir)


def test_a_run_starts_from_an_earlier_checkpoint(start, tmp_path, published):
    run_toy(start("first", None, *FIRST, "checkpoint.every=1", "checkpoint.keep=0"))
    began = tmp_path / "first/checkpoints/000001"
    second = run_toy(start("second", "first/checkpoints/000001", *SECOND))
    loaded = ToyAdapter()
    checkpoint.load_weights(began, loaded)
    assert equal(weights(second.adapter), weights(loaded), "layers.1")
    assert second.fingerprint["train.init_from"] == checkpoint.digest(began)
    assert parent_checkpoint(second.recipe, second.run_dir) == began
    assert equal(weights(load_start(second.recipe, run_dir=second.run_dir)), weights(loaded))
    assert find_sides("base", str(second.run_dir))[0].step == 1
    (tmp_path / "link").symlink_to(began)
    Trainer(start("second", "link", *SECOND, "train.steps=4"), ToyAdapter())
    with pytest.raises(RecipeError, match="train.init_from .* not the checkpoint that the run started from"):
        Trainer(start("second", "first", *SECOND, "train.steps=4"), ToyAdapter())

    with pytest.raises(RecipeError, match=r"000003 is inside the run folder .* \(there are: 000001, 000002\)"):
        Trainer(start("third", "first/checkpoints/000003"), ToyAdapter())
    shard = next((began / "weights").iterdir())
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"000001 is damaged \(.*\); pass another one of its run"):
        Trainer(start("third", "first/checkpoints/000001"), ToyAdapter())
    (began / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="train.init_from=.*000001 is not a complete checkpoint"):
        Trainer(start("third", "first/checkpoints/000001"), ToyAdapter())


def test_a_recipe_is_the_model_that_its_run_starts_from(start, tmp_path, published, monkeypatch):
    """Whatever loads it: reca.load and the commands that call it, an evaluation, and training."""
    first = weights(run_toy(start("first", None, *FIRST)).adapter)
    recipe = start("second", "first")
    file = tmp_path / "second.yaml"
    save_recipe(recipe, file)
    mine = target(file, (), "toy", None)
    model = reca.load(file, device="cpu")
    assert equal(weights(model), first) and equal(weights(mine.load("cpu")), first)
    assert mine.fingerprint(model) == mine.fingerprint()
    monkeypatch.setattr("reca.api._check_class", lambda *_: None)
    with pytest.raises(RecipeError, match=r"has the weights of a run, over which train.init_from=.* pass no model"):
        reca.train(recipe, model=model)
    assert not (tmp_path / "second").exists()


def test_only_a_base_without_any_weights_is_called_random(start, tmp_path, published, caplog):
    run_toy(start("first", None, *FIRST))
    mine = target(run_toy(start("second", "first")).run_dir, (), "toy", None)
    opponent("base", mine, (), "toy").load("cpu")
    assert "random" not in caplog.text
    opponent("base", target(tmp_path / "first", (), "toy", None), (), "toy").load("cpu")
    assert "names no weights" in caplog.text
