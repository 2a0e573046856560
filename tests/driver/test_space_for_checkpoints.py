"""Features that are cached leave a run's checkpoints their space, if they are on the same disk."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

from reca import checkpoint, preflight
from reca.data.cache import FeatureCache
from reca.data.views import View, Views
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy

VIEWS = Views(gen=View(4), und=None)


def test_the_space_is_that_of_the_checkpoints_to_come(recipe):
    made = recipe("checkpoint.every=1", "checkpoint.keep=2", "train.steps=1")
    run_dir = run_toy(made).run_dir
    longer = recipe("checkpoint.every=1", "checkpoint.keep=2", "train.steps=9")
    needed = preflight.space_for_checkpoints(longer, ToyAdapter())
    each = checkpoint.size(ToyAdapter(), longer.optim)
    assert needed(run_dir) == 2.5 * each  # two are kept, and a third one is written before the oldest is removed
    Trainer(longer, ToyAdapter()).run()
    assert needed(run_dir) == 1.25 * each and needed(Path("/dev")) == 0


def test_the_cache_ends_where_the_space_would_be_used(tmp_path, monkeypatch, caplog):
    def disk_usage(folder):
        return SimpleNamespace(free=3000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    need = [3000, 3001]
    cache = FeatureCache(tmp_path, VIEWS, "identity", lambda folder: need.pop(0))
    for address in ("aa", "bb", "cc"):
        cache.put([address], {"h_v": torch.ones(1, 2)})
        cache.flush()
    assert [cache.get(address) is not None for address in ("aa", "bb", "cc")] == [True, False, False]
    assert caplog.text.count("as its checkpoints need 2.93 KiB of this disk (2.93 KiB free). Free some space") == 1


def test_a_run_gives_its_cache_that_space(recipe, tmp_path):
    trainer = Trainer(recipe("train.steps=1", "objective.i2t.weight=0", f"data.cache={tmp_path}/cache"), ToyAdapter())
    assert trainer.loaders["reca"].cache.spare(tmp_path) == 1.25 * checkpoint.size(
        trainer.adapter, trainer.recipe.optim
    )
