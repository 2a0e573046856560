"""A whole step: both formulations are the same mathematics, and what is measured of them is told as it was."""

import copy

import pytest
import torch

from benchmarks.step import release
from benchmarks.step.recipes import MODELS, step_recipe
from reca import objective
from reca.data.loader import open_loader
from reca.lora import choose_trained
from reca.models import umm_package
from reca.optim import make_optimizer
from reca.precision import autocast, cast


def gradients(model, folder, form, precision="fp64", **changed):
    """Loss and gradients of one step of the tiny model; `changed` are keys, their dots written as __."""
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    changes = release.recipe_changes(model) if form == "release" else {}
    recipe = step_recipe(model, "tiny", folder, changed | {"train.precision": precision})
    checkpointed = recipe.train.activation_checkpointing
    recipe = step_recipe(model, "tiny", folder, changed | {"train.precision": precision} | changes)
    adapter = cast(umm_package(recipe.umm).Adapter.load(recipe.model), precision)
    choose_trained(adapter, recipe)
    adapter.train()
    if form == "release":
        release.formulate(adapter, checkpointed)
    reca, seed = recipe.objective.reca, recipe.train.seed
    loader = open_loader(
        recipe.data, "reca", adapter.views("reca"), seed=seed, micro_batch=reca.micro_batch, batch_size=reca.batch_size
    )
    stream = iter(loader)
    batches = {"reca": [next(stream) for _ in range(reca.batch_size // reca.micro_batch)]}
    context = autocast(precision, torch.device("cpu"))
    sums = objective.backward(adapter, batches, recipe.objective, seed, context)["reca"]
    return sums, {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


# Noise and noisy inputs are fp32 in both forms, and rounded in another order.
@pytest.mark.parametrize(("precision", "recomputed", "tolerance"), [("fp64", False, 1e-6), ("fp32", True, 2e-5)])
@pytest.mark.parametrize("model", release.RELEASED)
def test_both_forms_are_the_same_mathematics(model, precision, recomputed, tolerance, tmp_path):
    given = dict(precision=precision, train__activation_checkpointing=recomputed)
    (ours, mine), (theirs, released) = (gradients(model, tmp_path, form, **given) for form in ("ours", "release"))
    assert ours[1] == theirs[1] and torch.allclose(ours, theirs, rtol=tolerance), (ours, theirs)
    assert mine and set(mine) <= set(released)
    for name, grad in mine.items():
        off = float((grad - released[name]).norm() / grad.norm().clamp(min=1e-9 * len(mine)))
        assert off < 10 * tolerance or grad.norm() < tolerance, (name, off)
    for name in set(released) - set(mine):  # what only the release carries along
        assert not released[name].any(), name
