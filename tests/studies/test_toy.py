"""What a model is measured by on a toy dataset, and an encoder that takes red for blue, from files to files."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from reca.demo.measure import Measured, Rate
from reca.studies import toy, work
from reca.studies.plan import plan
from reca.studies.study import load_study
from reca.studies.task import Asked
from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import load_dataset
from reca.toy_datasets.scene import Scene


def test_measures_are_percentages_beside_images_of_held_out_pairs(tmp_path, monkeypatch):
    of_category = {"single": (9, 10), "colour": (7, 7), "two": (1, 4), "attribution": (2, 8), "position": (0, 5)}
    rates = {f"{name}, all": Rate(*counts) for name, counts in of_category.items()}
    pooled = {"seen": Rate(3, 4), "held-out": Rate(1, 2), "single seen": Rate(1, 1)}
    texts = [caption(Scene((thing,))) for thing in load_dataset("shapes").held_out(3)]
    samples = [(text, torch.zeros(3, 4, 4, dtype=torch.uint8), i % 4 == 1) for i, text in enumerate(texts)]
    samples.insert(0, ("of no held-out pair", torch.zeros(3, 4, 4, dtype=torch.uint8), True))
    found = Measured(rates | pooled, 2.4 / 5, samples)
    monkeypatch.setattr(toy, "measure", lambda *_: found)
    task = plan(load_study("main"), Asked("show_o", (3,), tmp_path))[0][-1]
    measures = toy.measured(None, task)
    assert measures["single"] == {"value": pytest.approx(90), "hits": 9, "trials": 10}
    assert measures["held-out"] == {"value": 50, "hits": 1, "trials": 2}
    assert measures.keys() == {"overall", "single", "two", "position", "seen", "held-out"}  # nothing was answered
    # Zou and Donner 2008: distances of the bounds from the shares are combined as independent errors are.
    reach = [math.hypot(*((rate.wilson()[side] - rate.share) * 100 / 5 for rate in rates.values())) for side in (0, 1)]
    interval = pytest.approx([48 - reach[0], 48 + reach[1]])
    assert measures["overall"] == {"value": pytest.approx(48), "interval": interval, "percent": True}
    shown = [{"prompt": text, "hit": i % 4 == 1} for i, text in enumerate(texts)][1::2]
    assert json.loads((task.folder / "images.json").read_text()) == shown
    assert Image.open(task.folder / "images.png").height < 4 + 8  # one row


@pytest.mark.parametrize(
    ("layer", "pixels"),
    [(torch.nn.Conv2d(3, 5, 2), torch.rand(2, 3, 4, 4)), (torch.nn.Linear(12, 5), torch.rand(2, 4, 3))],
)
def test_an_encoder_that_takes_red_for_blue_sees_what_the_other_sees_in_swapped_images(layer, pixels):
    model = torch.nn.Module()
    model.patch_embedding, model.roles = layer, lambda: {"patch_embedding.weight": "und_encoder"}
    channels, linear = (2, True) if pixels.ndim == 3 else (1, False)
    wanted = layer(pixels.flatten(1) if linear else pixels)
    toy.swap_red_and_blue(model)
    swapped = pixels.flip(channels)
    torch.testing.assert_close(layer(swapped.flatten(1) if linear else swapped), wanted)


def test_the_only_image_of_a_held_out_pair_is_shown(tmp_path):
    thing = next(iter(load_dataset("shapes").held_out(3)))
    text = caption(Scene((thing,)))
    for samples, shown in (([], False), ([(text, torch.zeros(3, 4, 4, dtype=torch.uint8), True)], True)):
        toy._write_images(Measured({}, 0.0, samples), [thing], tmp_path)
        assert (tmp_path / "images.png").exists() == (tmp_path / "images.json").exists() == shown
    assert json.loads((tmp_path / "images.json").read_text()) == [{"prompt": text, "hit": True}]


def test_the_curve_of_pre_training_is_every_tenth_step(tmp_path, monkeypatch):
    (task, *_), reported = plan(load_study("main"), Asked("show_o", (0,), tmp_path))[0], []

    def pretrain(recipe, seed, folder, scale, progress):
        for step in range(1, 26):
            progress(step, 1 / step)

    monkeypatch.setattr(toy, "_setup", lambda _: SimpleNamespace(pretrain=pretrain))
    assert toy.pretrain(task, reported.append) == [(10, 0.1), (20, 0.05)] and reported == [10, 20]


@pytest.mark.parametrize("umm", ["show_o", "bagel"])  # exported weights, and a run
def test_a_swapped_encoder_is_saved_beside_the_model(umm, tmp_path):
    origin, swapped, *_ = plan(load_study("encoder"), Asked(umm, (0,), tmp_path, scale=0.004))[0]
    assert work.work(origin)["curve"] == []  # its few steps are none of every tenth
    (swapped.folder / "of a run that was interrupted").mkdir(parents=True)
    assert work.work(swapped)["curve"] == []
    assert not (swapped.folder / "of a run that was interrupted").exists()
    models = [toy.load_pretrained(task, task.folder) for task in (origin, swapped)]
    first, second = ({name: p for name, p in model.named_parameters()} for model in models)
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert len(changed) == 1
    toy.swap_red_and_blue(models[0])
    assert torch.equal(first[changed[0]], second[changed[0]])
