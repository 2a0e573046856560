"""A recipe's model on fake tensors: shapes, dtypes, roles and layers as in training, without weights or memory."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from reca.config.recipe import Recipe
from reca.data.views import Views
from reca.models import umm_package
from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.processes.environment import environment
from reca.training.lora import choose_trained


def build_meta(recipe: Recipe, tokenizer: Any = None) -> tuple[Adapter, FakeTensorMode]:
    """Build the recipe's model on fake tensors, frozen as in training. Return it with its FakeTensorMode.

    tokenizer: as in `Adapter.build_meta`.
    Raises ValueError for roles and patterns that match nothing in the model, and RecipeError as `check_tasks`.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        adapter = umm_package(recipe.umm).Adapter.build_meta(recipe.model, tokenizer)
    check_tasks(adapter, recipe)
    choose_trained(adapter, recipe)
    for module in adapter.modules():  # LoRA parameters are real tensors
        for name, p in module._parameters.items():
            if p is not None and not isinstance(p, FakeTensor):
                module._parameters[name] = nn.Parameter(fake.from_tensor(p.detach()), requires_grad=p.requires_grad)
    return adapter, fake


@contextlib.contextmanager
def attention(usual: str) -> Iterator[None]:
    """Compute attention on fake CPU tensors by `usual`, unless RECA_ATTENTION forces an impl that takes CPU tensors."""
    forced = os.environ.get("RECA_ATTENTION")
    with environment(RECA_ATTENTION=forced if forced in ("sdpa", "dense") else usual):
        yield


def check_templates(recipe: Recipe, tokenizer: Any, templates: Sequence[str]) -> None:
    """Raise ValueError for a template that is too long for the recipe's model, which has this tokenizer."""
    adapter, _ = build_meta(recipe, tokenizer)
    adapter.check_templates(templates)


def empty_views(views: Views, images: int) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """Return pixels without values, as (gen, und) of a `Batch`: uint8 [3, S, S] per image in the views' sizes."""
    gen, und = (
        None if view is None else [torch.empty(3, view.size, view.size, dtype=torch.uint8) for _ in range(images)]
        for view in (views.gen, views.und)
    )
    return gen, und


def check_tasks(adapter: Adapter, recipe: Recipe) -> None:
    """Raise RecipeError if the model lacks the loss of a task that the recipe trains."""
    for task in recipe.active_tasks():
        if task not in adapter.tasks:
            raise RecipeError(f"{recipe.umm} has no {task} loss: set objective.{task}.weight=0")
