"""What a run ends in: its images, and what the model made of them before and after."""

import functools

import pytest
import torch
from PIL import Image

import reca
from reca import checkpoint, cli
from reca.config.recipe_files import load_recipe
from reca.models import umm_package
from reca.monitoring.diagnostics import Diagnostics
from reca.monitoring.reconstructions import BEFORE, GRID, image_batch, reconstruct, side_by_side
from reca.trainer import Trainer
from tests.driver.toy import write_images


@pytest.fixture
def keys(tmp_path):
    def make(umm="show_o", **more):
        given = {
            "run_dir": str(tmp_path / "run"), "data.images": str(write_images(tmp_path / "photos", 6)),
            "train.steps": 1, "train.threads": 1, "data.workers": 0, "objective.i2t.weight": 0,
            "objective.reca.batch_size": 4, "objective.reca.micro_batch": 4, "log.tensorboard": False,
            "log.reconstructions": 2,
        }  # fmt: skip
        return load_recipe(f"{umm}_tiny", given | more)

    return make


def test_the_grid_has_images_before_and_after(keys, tmp_path, capsys):
    recipe = keys()
    reca.train(recipe)
    first = {path.name: path.read_bytes() for path in (tmp_path / "run" / BEFORE).iterdir()}
    assert sorted(first) == ["000.png", "001.png"]
    grid = (tmp_path / "run" / GRID).read_bytes()
    overrides = [
        "train.steps=2",
        *(f"{key}={value}" for key, value in (("data.workers", 0), ("log.reconstructions", 2))),
    ]
    assert cli.main(["train", str(tmp_path / "run/recipe.yaml"), *overrides]) == 0  # goes on: what was before stays
    assert f"before and after training: {tmp_path}/run/{GRID}" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / BEFORE).iterdir()} == first
    assert (tmp_path / "run" / GRID).read_bytes() != grid
    base, trained = reca.load("show_o_tiny"), reca.load(tmp_path / "run")
    batch = image_batch(recipe, base, 2)
    side_by_side(batch.gen, reconstruct(base, batch), reconstruct(trained, batch)).save(tmp_path / "wanted.png")
    with Image.open(tmp_path / "run" / GRID) as made, Image.open(tmp_path / "wanted.png") as wanted:
        assert made.size == wanted.size and made.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("umm", ["show_o", "harmon"])  # harmon: dropout
def test_drawing_changes_no_bit_of_the_training(keys, tmp_path, umm, monkeypatch):
    kind, states = umm_package(umm).Adapter, []
    monkeypatch.setattr(kind, "reconstruct", functools.partialmethod(kind.reconstruct, steps=2))
    for count in (0, 1):
        run = reca.train(keys(umm, run_dir=str(tmp_path / f"run{count}"), **{"log.reconstructions": count}))
        folder = checkpoint.latest(run.folder)
        states.append({name: checkpoint.read_weight(folder, name) for name in checkpoint.list_weights(folder)})
        assert (run.folder / GRID).is_file() == bool(count)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_cannot_be_drawn_ends_no_run(keys, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Diagnostics, "reconstructions", lambda self: 1 / 0)
    assert reca.train(keys()).steps == 1
    assert "no reconstructions (ZeroDivisionError: division by zero); log.reconstructions=0" in caplog.text


def test_nothing_is_drawn_for_who_shows_nothing(keys, tmp_path):
    Trainer(keys(), progress=lambda step: None).run()
    assert not (tmp_path / "run" / GRID).exists() and not (tmp_path / "run/samples").exists()
