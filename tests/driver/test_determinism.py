"""train.deterministic: what it sets, for how long, and what it refuses."""

import logging
import os

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.options.fields import RecipeError
from reca.runs.status import Status
from reca.trainer import Trainer
from reca.training.determinism import CUBLAS, deterministic
from reca_kernels.attention import op
from tests.driver.toy import ToyAdapter


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.setenv(CUBLAS, "")
    monkeypatch.delenv(CUBLAS)


def settings() -> tuple:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize("on", [False, True])
def test_it_holds_in_every_step_and_no_longer(recipe, on, caplog):
    before, seen = settings(), []
    trainer = Trainer(recipe(f"train.deterministic={on}", "train.steps=2"), ToyAdapter())
    step = trainer.train_step

    def watched(batches):
        seen.append((settings(), os.environ.get(CUBLAS)))
        return step(batches)

    trainer.train_step = watched
    with caplog.at_level(logging.INFO, "reca"):
        trainer.run()
    assert seen == [((True, True, False), ":4096:8") if on else (before, None)] * 2
    assert settings() == before and ("deterministic: torch.use" in caplog.text) == on


def test_an_operation_without_a_deterministic_implementation_ends_the_run(recipe):
    trainer = Trainer(recipe("train.deterministic=true"), ToyAdapter())
    loss = trainer.adapter.loss

    def puts(batch, features, rng):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        return loss(batch, features, rng)

    trainer.adapter.loss = puts
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        trainer.run()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "deterministic" in Status.read(trainer.run_dir).reason


@pytest.mark.parametrize(("value", "taken"), [(":16:8", True), (":4096:8", True), (":0:0", False), ("", False)])
def test_a_workspace_of_the_user(monkeypatch, value, taken):
    monkeypatch.setenv(CUBLAS, value)
    if taken:
        with deterministic(True):
            assert os.environ[CUBLAS] == value
    else:
        message = f"needs {CUBLAS}=:4096:8 or :16:8, and it is {value!r}"
        with pytest.raises(RecipeError, match=message), deterministic(True):
            pass


@pytest.mark.parametrize("on", [False, True])
def test_attention_takes_a_deterministic_gradient(tmp_path, monkeypatch, on):
    seen = set()
    for name, function in list(op.IMPLS.items()):

        def noted(*args, function=function):
            seen.add(args[-1])
            return function(*args)

        monkeypatch.setitem(op.IMPLS, name, noted)
    keys = [f"run_dir={tmp_path}/run", f"train.deterministic={on}", "train.steps=1", "log.tensorboard=false"]
    Trainer(load_recipe("show_o_tiny", [*keys, "data.workers=0"]), progress=lambda _: None).run()
    assert seen == {on}
