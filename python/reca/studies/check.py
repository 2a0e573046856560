"""Validation of the variants' recipes before anything runs."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from reca.checkpoint import CheckpointError
from reca.config.recipe import LoraConfig, Recipe
from reca.config.recipe_files import load_recipe
from reca.data.errors import DataError
from reca.estimate.fit import asked_by
from reca.estimate.meta_model import build_meta
from reca.models.base import Adapter
from reca.optim import check_passes
from reca.options.fields import RecipeError
from reca.preflight import check_files, check_recipe
from reca.runs.lineage import check_parent
from reca.runs.sources import open_run_sources
from reca.studies.study import BEFORE, PRETRAINED
from reca.studies.task import Task
from reca.training.lora import target_names
from reca.training.recompute import checkpoint_activations


def check(tasks: Sequence[Task], here: bool) -> None:
    """Raise the error that a variant's recipe would cause at run time, possibly hours later.

    Takes about a second per variant and allocates no weights. One seed of each variant is checked. Memory and GPUs are
    not checked.
    here: the variants run on this machine, so their data and the run that they start from are checked, too.
    Raises RecipeError, DataError for templates and data, or CheckpointError for train.init_from, naming the variant.
    """
    first: dict[str, Task] = {}
    for task in tasks:
        if task.kind != PRETRAINED:
            first.setdefault(task.variant, task)
    made = {str(task.folder) for task in tasks}
    opened: set[str] = set()
    for task in first.values():
        try:
            model = _check(task)
            if here and task.kind != BEFORE:
                _check_inputs(load_recipe(task.recipe, task.overrides), model, made, opened)
        except (ValueError, CheckpointError) as error:
            kind = type(error) if isinstance(error, DataError | CheckpointError) else RecipeError
            raise kind(f"variant {task.variant}: {error}") from error


def _check_inputs(recipe: Recipe, model: Adapter, made: Collection[str], opened: set[str]) -> None:
    """Open the data, unless another variant has the same, and check a parent run that is not of the study.

    made: folders of the study's unfinished tasks. opened: data that was opened, which this function extends.
    """
    if recipe.train.init_from not in made:
        check_parent(recipe, model)
    data = repr((recipe.data, recipe.active_tasks(), recipe.eval.holdout, recipe.eval.holdout_from))
    if data not in opened:
        open_run_sources(recipe, recipe.active_tasks())
        opened.add(data)


def _check(task: Task) -> Adapter:
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
    return model


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
