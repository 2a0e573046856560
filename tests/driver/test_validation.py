"""Held-out images: what is held out, and that their loss is a function of the weights alone."""

import numpy as np
import pytest
import torch

from reca import objective
from reca.config.recipe_files import load_recipe
from reca.data.errors import DataError
from reca.data.held_out import hold_out, take
from reca.data.order import make_order
from reca.data.sources.factory import open_source
from reca.data.sources.mixture import Mixture, Subset
from reca.models import UMMS
from reca.monitoring.validation import HeldOut
from reca.options.fields import RecipeError
from reca.runs.sources import HELD_OUT, open_run_sources
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy, weights, write_images
from tests.models.contract import shared

EAGER = torch.autocast("cpu", enabled=False)


def keys(source) -> set[str]:
    return {source.key(i) for i in range(len(source))}


def test_what_is_held_out_is_trained_on_by_no_task(recipe):
    r = recipe("eval.holdout=5", "objective.t2i.weight=1")
    sources = open_run_sources(r, r.active_tasks())
    aside = keys(sources[HELD_OUT])
    assert len(aside) == 5 and len(sources["reca"]) == len(sources["t2i"]) == 19
    assert not aside & (keys(sources["reca"]) | keys(sources["t2i"]))
    again, other = (
        open_run_sources(recipe("eval.holdout=5", key), ["reca"]) for key in ("train.seed=7", "eval.seed=1")
    )
    assert keys(again[HELD_OUT]) == aside != keys(other[HELD_OUT])
    trainer = run_toy(r)
    order = trainer.loaders["reca"].order
    assert not aside & {sources["reca"].key(order.index(p)) for p in range(6 * 8)}


def test_images_are_held_out_of_a_run_without_the_task_reca(recipe):
    sources = open_run_sources(recipe("eval.holdout=5"), ["t2i"])
    assert len(sources[HELD_OUT]) == 5 and len(sources["t2i"]) == 19
    assert not keys(sources[HELD_OUT]) & keys(sources["t2i"])


def test_a_mixture_gives_from_each_of_its_sources(tmp_path):
    one, two = (open_source(str(write_images(tmp_path / name, 20)), "reca") for name in "ab")
    rest, aside = hold_out({"reca": Mixture([one, two], [3.0, 1.0], ["a", "b"])}, 8, 0)
    assert [len(part) for part in aside.source.parts] == [6, 2]
    order = make_order(aside, 0, shuffle=False)
    assert sorted(map(order.index, range(8))) == list(range(8))  # each of them once
    named = set().union(*map(keys, aside.source.parts))  # both folders have the same names: neither trains on one
    assert not any(keys(part) & named for part in rest["reca"].parts)


def test_a_small_source_of_a_mixture_keeps_half(tmp_path):
    """What it cannot give, the others do; each stays one that can be drawn from."""
    one, two = (open_source(str(write_images(tmp_path / name, count)), "reca") for name, count in (("a", 60), ("b", 9)))
    two = Subset(two, np.arange(5, 9))  # other names than the held-out ones of the first may have
    rest, aside = hold_out({"reca": Mixture([one, two], [1.0, 1.0], ["a", "b"])}, 16, 0)
    assert len(aside) == 16 and [len(part) for part in aside.source.parts] == [14, 2]
    order = make_order(rest["reca"], 0)
    assert len({order.index(place) for place in range(2048)}) == len(rest["reca"])


def test_a_source_that_would_be_emptied_is_named(tmp_path):
    """Samples of the held-out images are left out of every task, and may be all that one of its sources has."""
    one, two = (open_source(str(write_images(tmp_path / name, 20)), "reca") for name in "ab")
    aside = hold_out({"reca": one}, 2, 0)[1]
    same = Subset(two, np.array([i for i in range(20) if two.key(i) in keys(aside)]))
    with pytest.raises(DataError, match=r"eval.holdout=2 leaves no sample for b of t2i; lower it"):
        hold_out({"reca": one, "t2i": Mixture([two, same], [1.0, 1.0], ["a", "b"])}, 2, 0)
    with pytest.raises(DataError, match=r"eval.holdout=2 leaves no sample for t2i; lower it"):
        hold_out({"reca": one, "t2i": same}, 2, 0)


def test_images_of_a_mixture_that_are_named_for_it_are_drawn_once(tmp_path):
    one, two = (open_source(str(write_images(tmp_path / name, count)), "reca") for name, count in (("a", 9), ("b", 2)))
    for count in (6, 11):
        given = take(Mixture([one, two], [1.0, 3.0], ["a", "b"]), count, 0)
        order = make_order(given, 0, shuffle=False)
        assert sorted(map(order.index, range(count))) == list(range(len(given))) == list(range(count))


@pytest.mark.parametrize("data", ["inside", "named"])
def test_a_held_out_image_that_cannot_be_read_is_one_of_all_images(recipe, tmp_path, data):
    images = write_images(tmp_path / "many", 120)
    keys = [f"data.images={images}", "eval.holdout=20"]
    keys += ["eval.holdout_from=" + str(images)] if data == "named" else []
    r = recipe(*keys)
    aside = open_run_sources(r, ["reca"])[HELD_OUT]
    (images / aside.key(3)).write_bytes(b"no image")
    assert len(HeldOut(r, ToyAdapter(), aside, torch.device("cpu"), EAGER).batches) > 0
    (images / aside.key(4)).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 of 120 samples are unreadable, more than data.max_bad_fraction=0.01"):
        HeldOut(r, ToyAdapter(), open_run_sources(r, ["reca"])[HELD_OUT], torch.device("cpu"), EAGER)


def test_what_cannot_be_held_out(recipe):
    with pytest.raises(DataError, match=r"eval.holdout=13 is more than half .* at most 12 can be"):
        open_run_sources(recipe("eval.holdout=13"), ["reca"])
    with pytest.raises(RecipeError, match="eval.holdout_from is set but eval.holdout is 0: set it to the number of"):
        open_run_sources(recipe("eval.holdout_from=elsewhere"), ["reca"])
    with pytest.raises(RecipeError, match="holdout=1: the gap needs"):
        recipe("eval.holdout=1")
    with pytest.raises(RecipeError, match=r"takes images from data.images, which is null"):
        recipe("eval.holdout=2", "data.images=null", "objective.reca.weight=0", "objective.t2i.weight=1")


def test_other_images_change_nothing_of_the_training(recipe, tmp_path):
    other = write_images(tmp_path / "other", 6)
    plain = run_toy(recipe(f"run_dir={tmp_path}/plain"))
    trainer = run_toy(recipe(f"run_dir={tmp_path}/held", "eval.holdout=4", f"eval.holdout_from={other}"))
    assert len(trainer.sources[HELD_OUT]) == 4
    assert trainer.evaluations.held_out is None  # without eval.every no image is read
    assert all(torch.equal(value, weights(trainer.adapter)[name]) for name, value in weights(plain.adapter).items())


def test_a_run_whose_training_images_change_is_refused(recipe):
    run_toy(recipe("train.steps=2"))
    with pytest.raises(RecipeError, match=r"eval.holdout 0 -> 4 has other contents \(24 samples, now 20\)"):
        Trainer(recipe("eval.holdout=4"), ToyAdapter())


def held_out(r, adapter):
    return HeldOut(r, adapter, open_run_sources(r, ["reca"])[HELD_OUT], torch.device("cpu"), EAGER)


def test_the_same_weights_give_the_same_bits(recipe):
    """At any step, after any other use of random numbers, with any seed of the training, and without dropout."""
    r, adapter = recipe("eval.holdout=7"), ToyAdapter()
    adapter.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    own, modes = held_out(r, adapter), set()
    first = own.measure()
    adapter.train()
    torch.rand(3)
    assert own.measure() == first == held_out(recipe("eval.holdout=7", "train.seed=9"), adapter).measure()
    assert held_out(recipe("eval.holdout=7", "eval.seed=1"), adapter).measure() != first
    with torch.no_grad():
        adapter.layers[1].bias += 0.1
    assert own.measure() != first and modes == {False}


def test_ranks_share_the_images(recipe, monkeypatch):
    """Every rank makes as many passes, and each image counts once."""
    r, adapter = recipe("eval.holdout=7"), ToyAdapter(dtype=torch.float64)
    whole = held_out(r, adapter).measure()
    seen = []
    monkeypatch.setattr("reca.distributed.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("reca.distributed.rank", lambda rank=rank: rank)
        seen.append(held_out(r, adapter).batches)
    assert {len(batches) for batches in seen} == {2}
    counted = [batch for batches in seen for batch in batches if batch.counted]
    assert sorted(i for batch in counted for i in batch.sample_ids.tolist()) == list(range(7))
    seed = held_out(r, adapter).seed
    own, other = (objective.evaluate(adapter, counted, seed, EAGER, condition) for condition in ("own", "other"))
    assert (own, other - own) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", UMMS)
def test_the_native_losses(name):
    r = load_recipe(f"{name}_tiny", ["eval.holdout=3", "objective.reca.micro_batch=2", "data.workers=0"])
    model = shared(name)
    own = held_out(r, model)
    first = own.measure()
    model.train()
    again = own.measure()
    model.eval()
    assert first == again and first.loss > 0 and first.gap != 0


def test_one_image_has_no_other(recipe, caplog):
    with pytest.raises(DataError, match="condition=other takes h_v from another image, but data.images has only one"):
        Trainer(recipe("objective.condition=other", "data.limit=1"), ToyAdapter())
    Trainer(recipe("log.gap_every=2", "data.limit=1"), ToyAdapter())
    assert "log.gap_every takes h_v from another image, but data.images has only one" in caplog.text
