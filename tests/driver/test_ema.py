"""The moving average of the trained parameters: its weights, its precision, and its way through checkpoints."""

import pytest
import torch

from reca import api, checkpoint
from reca.checkpoint import CheckpointError
from reca.options.fields import RecipeError
from reca.trainer import Trainer
from reca.training.ema import EMA, newest_weight
from tests.driver.toy import ToyAdapter, run_toy, weights


def shares(updates: int, half_life: float) -> list[float]:
    """The part of each step in the average, out of its recursion."""
    found: list[float] = []
    for n in range(1, updates + 1):
        weight = newest_weight(n, half_life)
        found = [share * (1 - weight) for share in found] + [weight]
    return found


@pytest.mark.parametrize("half_life", [1e-3, 0.5, 1, 7, 250, 1e9])
@pytest.mark.parametrize("updates", [1, 2, 40, 600])
def test_a_step_counts_half_after_its_half_life(updates, half_life):
    expected = torch.exp2(-torch.arange(updates - 1, -1, -1, dtype=torch.float64) / half_life)
    got = torch.tensor(shares(updates, half_life), dtype=torch.float64)
    torch.testing.assert_close(got, expected / expected.sum(), rtol=1e-9, atol=1e-300)
    if half_life < updates and half_life == int(half_life):
        assert float(got[-1] / got[-1 - int(half_life)]) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_average_is_that_of_fp64(dtype):
    """Also of bf16 parameters, whose own average would stand still: 1e-3 of a difference is below half a step there."""
    adapter, half_life, updates = ToyAdapter(dtype=dtype), 60.0, 200
    for name, p in adapter.named_parameters():
        p.requires_grad_(name.startswith("layers"))
    ema, seen = EMA(adapter, half_life), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        with torch.no_grad():
            for p in adapter.layers.parameters():
                p += torch.randn(p.shape, generator=generator).to(dtype) * 0.01
        ema.update()
        seen.append(adapter.layers[0].weight.detach().double().clone())
    share = torch.exp2(-torch.arange(updates - 1, -1, -1, dtype=torch.float64) / half_life)
    expected = torch.einsum("n,nij->ij", share / share.sum(), torch.stack(seen))
    assert set(ema.averages) == {name for name in weights(adapter) if name.startswith("layers")}
    assert all(average.dtype == torch.float32 for average in ema.averages.values())
    torch.testing.assert_close(ema.averages["layers.0.weight"].double(), expected, rtol=0, atol=2e-6)


def test_one_step_is_its_own_average(recipe):
    """And nothing of the start, which an average of 0.9999 would be almost all of."""
    trainer = run_toy(recipe("ema.half_life=5000", "train.steps=1"))
    for name, average in trainer.ema.averages.items():
        assert torch.equal(average, weights(trainer.adapter)[name])
        assert not torch.equal(average, weights(ToyAdapter())[name]) or "bias" in name


def test_it_goes_on_exactly_and_changes_no_weight(recipe, tmp_path):
    plain = run_toy(recipe(f"run_dir={tmp_path}/plain"))
    whole = run_toy(recipe(f"run_dir={tmp_path}/whole", "ema.half_life=2"))
    run_toy(recipe(f"run_dir={tmp_path}/parts", "ema.half_life=2", "train.steps=3"))
    parts = run_toy(recipe(f"run_dir={tmp_path}/parts", "ema.half_life=2"))
    for name, value in weights(plain.adapter).items():
        assert torch.equal(value, weights(whole.adapter)[name])
    for name, average in whole.ema.averages.items():
        assert torch.equal(average, parts.ema.averages[name]) and not torch.equal(average, weights(whole.adapter)[name])


@pytest.mark.parametrize("before", [0, 5])
def test_another_half_life_begins_an_average_of_its_own(recipe, before, caplog):
    run_toy(recipe(f"ema.half_life={before}", "train.steps=5"))
    trainer = run_toy(recipe("ema.half_life=2"))
    assert trainer.ema.updates == 1 and "a new EMA starts" in caplog.text
    for name, average in trainer.ema.averages.items():
        assert torch.equal(average, weights(trainer.adapter)[name])


def test_an_average_of_no_step_is_what_the_run_goes_on_from(recipe):
    """Not what it was published as, although no step has been averaged yet."""
    trained = run_toy(recipe("train.steps=3"))
    trainer = Trainer(recipe("ema.half_life=2"), ToyAdapter())
    for name, average in trainer.ema.averages.items():
        assert torch.equal(average, weights(trained.adapter)[name])


def test_a_skipped_step_is_not_averaged(recipe):
    trainer = Trainer(recipe("ema.half_life=2", "train.steps=4"), ToyAdapter())
    loss = trainer.adapter.loss

    def poisoned(batch, features, rng):
        term = loss(batch, features, rng)
        return term._replace(sum=term.sum * float("nan")) if trainer.step == 2 else term

    trainer.adapter.loss = poisoned
    trainer.run()
    assert trainer.ema.updates == 3 and all(torch.isfinite(average).all() for average in trainer.ema.averages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_loaded_on_request(recipe, dtype):
    trainer = run_toy(recipe("ema.half_life=2"))
    raw, averaged = ToyAdapter(dtype=dtype), ToyAdapter(dtype=dtype)
    checkpoint.load_weights(checkpoint.find_valid(trainer.run_dir), raw)
    names = checkpoint.load_weights(checkpoint.find_valid(trainer.run_dir), averaged, ema=True)
    assert names == trainer.ema.averages.keys()
    for name in names:
        assert torch.equal(weights(raw)[name], weights(trainer.adapter)[name].to(dtype))
        assert torch.equal(weights(averaged)[name], trainer.ema.averages[name].to(dtype))


def test_a_run_without_one_says_so(recipe):
    trainer = run_toy(recipe("train.steps=1"))
    with pytest.raises(CheckpointError, match="has no EMA.*ema.half_life=0"):
        checkpoint.load_weights(checkpoint.find_valid(trainer.run_dir), ToyAdapter(), ema=True)
    with pytest.raises(RecipeError, match="only a run has an EMA"):
        api.load("show_o_tiny", ema=True)


def test_averages_that_do_not_fit_are_refused(recipe):
    """A run goes on from all of its averages; a model may have parameters without one."""
    trainer = run_toy(recipe("ema.half_life=2", "train.steps=1"))
    folder, saved = checkpoint.latest(trainer.run_dir), trainer.ema.averages
    empty = {name: torch.zeros_like(average) for name, average in saved.items()}
    less = {name: value for name, value in empty.items() if name != "layers.0.bias"}
    for averages, all_of_them in (
        (less, True),
        (less, False),
        (less | {"layers.0.bias": torch.zeros(1)}, False),
        (empty | {"more": torch.zeros(1)}, True),
    ):
        with pytest.raises(CheckpointError, match="ema does not fit this model"):
            checkpoint.load_ema(folder, averages, all_of_them)
    checkpoint.load_ema(folder, empty | {"more": torch.zeros(1)}, all_of_them=False)
    assert all(torch.equal(empty[name], average) for name, average in saved.items())


def test_a_checkpoint_is_as_large_as_it_was_said_to_be(recipe):
    trainer = run_toy(recipe("ema.half_life=2", "train.steps=1"))
    with_ema, without = (checkpoint.size(trainer.adapter, trainer.recipe.optim, ema) for ema in (True, False))
    assert with_ema - without == sum(4 * average.numel() for average in trainer.ema.averages.values())
