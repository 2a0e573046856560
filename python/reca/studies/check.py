"""Validation of the variants' recipes before anything runs."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from reca.config.recipe import LoraConfig, Recipe
from reca.config.recipe_files import load_recipe
from reca.data.errors import DataError
from reca.estimate.fit import asked_by
from reca.estimate.meta_model import build_meta
from reca.models.base import Adapter
from reca.optim import check_passes
from reca.options.fields import RecipeError
from reca.preflight import check_files, check_recipe
from reca.studies.study import PRETRAINED
from reca.studies.task import Task
from reca.training.lora import target_names
from reca.training.recompute import checkpoint_activations


def check(tasks: Sequence[Task]) -> None:
    """Raise the error that a variant's recipe would cause at run time, possibly hours later.

    Takes about a second per variant and allocates no weights. One seed of each variant is checked. Data, memory and
    GPUs are not checked, as the variant may run on another machine.
    Raises RecipeError, or DataError for templates, naming the variant.
    """
    first: dict[str, Task] = {}
    for task in tasks:
        if task.kind != PRETRAINED:
            first.setdefault(task.variant, task)
    for task in first.values():
        try:
            _check(task)
        except ValueError as error:
            kind = DataError if isinstance(error, DataError) else RecipeError
            raise kind(f"variant {task.variant}: {error}") from error


def _check(task: Task) -> None:
    if task.setting == "published":
        recipe = load_recipe(task.recipe, task.overrides)
        check_files(recipe)
        model = _model(recipe)
    else:
        recipe = load_recipe(task.recipe, [*task.overrides, "model.weights=null"])  # not pre-trained yet
        model = _model(recipe)
        _same_sizes(model, _model(load_recipe(task.recipe, task.of_pretraining)))
    if recipe.lora.rank:
        target_names(model, recipe.lora)
    check_recipe(recipe)
    if not asked_by(recipe):
        check_passes(recipe, ranks=1)
    checkpoint_activations(model, recipe.train)


def _model(recipe: Recipe) -> Adapter:
    """Build the recipe's model without allocating weights, and without LoRA, which takes peft seconds to add."""
    return build_meta(replace(recipe, lora=LoraConfig()))[0]


def _same_sizes(model: nn.Module, pretrained: nn.Module) -> None:
    """Raise RecipeError if the tensors of a variant's model differ in shape from those of the pre-trained model."""
    own, given = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, pretrained))
    for name in own | given:
        if own.get(name) != given.get(name):
            raise RecipeError(
                f"{name} has the shape {own.get(name)}, but {given.get(name)} in the pre-trained model that the "
                f"variant starts from: pass the model.* key as {PRETRAINED}:model.KEY=VALUE, which applies to "
                "pre-training and all variants"
            )
