"""What is wrong with the recipe of an arm, found before anything runs."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from reca.config import LoraConfig, Recipe
from reca.data.errors import DataError
from reca.fit import asked_by
from reca.lora import target_names
from reca.meta_model import build_meta
from reca.models.base import Adapter
from reca.optim import check_passes
from reca.options import RecipeError
from reca.preflight import check_files, check_recipe
from reca.recipe_files import load_recipe
from reca.recompute import checkpoint_activations
from reca.studies.study import START
from reca.studies.task import Task


def check(tasks: Sequence[Task]) -> None:
    """Raise the error that the run of an arm would meet in its recipe, which may be hours from now.

    Takes a second an arm, and no memory. Of the seeds of an arm one is checked. Data, memory and GPUs are not looked
    at: they are those of the machine on which the arm will run.
    Raises RecipeError, or DataError for templates, that names the arm.
    """
    first: dict[str, Task] = {}
    for task in tasks:
        if task.kind != START:
            first.setdefault(task.arm, task)
    for task in first.values():
        try:
            _check(task)
        except ValueError as error:
            kind = DataError if isinstance(error, DataError) else RecipeError
            raise kind(f"arm {task.arm}: {error}") from error


def _check(task: Task) -> None:
    if task.setting == "published":
        recipe = load_recipe(task.recipe, task.overrides)
        check_files(recipe)
        model = _model(recipe)
    else:
        recipe = load_recipe(task.recipe, [*task.overrides, "model.weights=null"])  # which are still to be made
        model = _model(recipe)
        _same_sizes(model, _model(load_recipe(task.recipe, task.of_start)))
    if recipe.lora.rank:
        target_names(model, recipe.lora)
    check_recipe(recipe, model)
    if not asked_by(recipe):
        check_passes(recipe, ranks=1)
    checkpoint_activations(model, recipe.train)


def _model(recipe: Recipe) -> Adapter:
    """Build the recipe's model without memory, and without LoRA, which takes peft seconds to add."""
    return build_meta(replace(recipe, lora=LoraConfig()))[0]


def _same_sizes(model: nn.Module, start: nn.Module) -> None:
    """Refuse an arm whose model has other tensors than the start that its weights come from."""
    own, given = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, start))
    for name in own | given:
        if own.get(name) != given.get(name):
            raise RecipeError(
                f"{name} has the size {own.get(name)}, and {given.get(name)} in the pre-trained model that the variant "
                f"starts from: give the model.* key as {START}:model.KEY=VALUE, which changes pre-training and all "
                "variants"
            )
