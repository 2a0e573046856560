"""Load, train and evaluate from Python. The command line calls the same functions."""

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reca import distributed
from reca.config.paths import expand_home
from reca.config.recipe import Recipe
from reca.config.recipe_files import by_key, load_recipe, reread
from reca.estimate import fit_run
from reca.hardware.devices import usable_device
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.inference import warn_of_random_weights, warn_of_untrained
from reca.options.fields import RecipeError, format_value
from reca.options.names import option
from reca.precision import usual_defaults
from reca.runs.finished import finished_steps
from reca.runs.lineage import load_start, load_trained, recipe_of, trained_source
from reca.trainer import Trainer


class TrainedRun(NamedTuple):
    """Describe a finished run."""

    folder: Path  # what `load` takes
    steps: int  # total number of steps
    new_steps: bool  # whether this call made any of them


@usual_defaults()
def load(
    source: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    device: torch.device | str | None = None,
    ema: bool = False,
) -> Adapter:
    """Load a model, ready for inference.

    Args:
        source: Name or path of a recipe, for the model that its run starts from: its published files, with the
            weights of train.init_from on top of them; or a run folder, for its newest checkpoint; or the folder of an
            earlier one, RUN/checkpoints/STEP. To load an export, name its recipe and override
            {"model.weights": FOLDER}.
        overrides: Recipe keys to override: ["model.dtype=bf16"] or {"model.dtype": "bf16"}.
        device: Device of the weights. None: a GPU, if there is one.
        ema: Load the run's exponential moving average (ema.half_life) instead of its last weights. Off by default,
            because an average lags, most of all in a short run.

    Returns:
        The model's `Adapter`. Its `abilities` say whether it generates, edits and answers.

    Raises:
        RecipeError: The recipe cannot be read as written, or the device cannot be used. It is a ValueError.
        ValueError: Files are missing, or do not match the recipe.
        CheckpointError: The run, or that of train.init_from, has no complete checkpoint, or no average for ema=True.
    """
    source = _path(source)
    recipe = recipe_of(source, overrides)
    device = usable_device(device)
    if trained_source(source):
        return load_trained(Path(source), recipe, device, ema)
    if ema:
        raise RecipeError(f"{source!r} is not a run folder, and only a run has an EMA: leave out {option('ema', True)}")
    warn_of_untrained(source)
    if recipe.train.init_from is None:
        warn_of_random_weights(source, recipe.model)
    return load_start(recipe, device)


def _path(source: str | Path) -> str:
    if not isinstance(source, str | Path):
        raise RecipeError(
            f"the model must be named by a recipe or a run folder, got an object of type {type(source).__name__}"
        )
    return expand_home(str(source))


def train(
    recipe: str | Path | Recipe, overrides: Sequence[str] | Mapping[str, Any] = (), model: Adapter | None = None
) -> TrainedRun:
    """Train a recipe, or resume its run, up to `train.steps` steps.

    Under torchrun every rank makes this call.

    Args:
        recipe: Name or path of a recipe, or one that `load_recipe` returned.
        overrides: Recipe keys to override: ["train.steps=100"] or {"train.steps": 100}.
        model: An adapter to train instead of the one that the recipe loads: of the class of the recipe's `umm`, which
            the run is loaded with, and with the same keys.

    Returns:
        The run folder, its number of steps, and whether this call made any of them.

    Raises:
        RecipeError: The recipe cannot be run as written, the run folder belongs to another recipe, `model` is of
            another class or was loaded with other keys, or memory is full. It is a ValueError.
        DataError: The data or the disk cannot be used. It is a ValueError.
        ValueError: Weights are missing, do not match the recipe, or contain NaN or infinity.
        TypeError: Overrides were given together with a Recipe object.
        CheckpointError: The checkpoints of the run folder, or of train.init_from, are damaged or do not match.
        RunInUse: Another process uses the run folder.
        NonFiniteError: Loss or gradient was not finite in more than train.max_skips steps in a row.
        CollapseError: An alarm has ended the run (eval.stop_on_alarm); its last step is saved.
        NotSavedError: The last checkpoint could not be written.
        PeerFailed: Another rank has failed, and prints the reason.
        SystemExit: With code 75: a signal arrived and a checkpoint was saved; the same call resumes.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise TypeError("overrides belong to a recipe that is named; change the Recipe itself")
    else:
        recipe = reread(recipe)
    if model is not None:
        _check_class(recipe, model)
        _check_keys(recipe, getattr(model, "config", recipe.model))
        if recipe.train.init_from is not None and model.inherited:
            raise RecipeError(
                f"the model has the weights of a run, over which train.init_from={recipe.train.init_from} would load "
                "others: pass no model, or set train.init_from to null"
            )
    made = finished_steps(fit_run.recorded(recipe))
    if made is None:
        Trainer(recipe, model).run()
    distributed.shut_down()
    return TrainedRun(Path(recipe.run_dir), recipe.train.steps if made is None else made, made is None)


def _check_class(recipe: Recipe, model: Adapter) -> None:
    """Refuse a model that is not the recipe's umm: its run would be loaded as one, and cannot be."""
    if not isinstance(model, umm_package(recipe.umm).Adapter):
        raise RecipeError(
            f"the model is a {type(model).__module__}.{type(model).__qualname__}, and the recipe's umm is "
            f"{recipe.umm}, as which its run would be loaded; write umm=PACKAGE.MODULE of a module that has this class "
            "as Adapter, and its Config"
        )


def _check_keys(recipe: Recipe, config: Any) -> None:
    """Refuse a model of other keys: its run names the recipe's, so that another model would be loaded from it."""
    given = copy.copy(recipe)
    given.model = config
    own, wanted = by_key(given), by_key(recipe)
    changed = [key for key in wanted if own[key] != wanted[key]]
    if changed:
        changes = "; ".join(f"{key} {format_value(own[key])}, not {format_value(wanted[key])}" for key in changed)
        raise RecipeError(
            f"the model was loaded with other keys than the recipe's ({changes}), and its run would be loaded with the "
            "recipe's; give both the same overrides"
        )


@usual_defaults()
def evaluate(
    suite: str,
    source: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    against: str | Path | None = None,
    judge: str | None = None,
    judge_options: Mapping[str, Any] | None = None,
    steps: Sequence[str] = ("generate", "judge", "score", "report"),
    images: str | Path | None = None,
    records: str | Path | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    images_per_item: int | None = None,
    limit: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 0,
    partial: bool = False,
    device: torch.device | str | None = None,
    ema: bool = False,
) -> dict[str, Any] | None:
    """Evaluate a model on a benchmark, as `reca eval` does. `reca.eval` describes the files.

    Args:
        suite: Name, such as "toy" or "geneval".
        source: A run folder, one of its checkpoints (RUN/checkpoints/STEP), or a recipe.
        overrides: Recipe keys to override.
        against: "base" (what the run started from), a run, a recipe, or the folder of an evaluation.
        judge: NAME or NAME:ARGUMENT. Only the named judge is called; the toy datasets use their own.
        judge_options: Options of the judge.
        steps: Which of generate, judge, score and report to make.
        images: A folder of images made elsewhere, in the benchmark's layout, instead of the step generate.
        records: Records, or a result file of the benchmark's own scripts, instead of the step judge.
        data: The benchmark's files, where they are not shipped.
        out: The folder of the evaluation. None: RUN/eval/STEP/SUITE, of the step of the checkpoint (SUITE_ema
            for ema=True).
        images_per_item: Images per prompt. None: that of the benchmark.
        limit: Number of items, spread evenly over the suite.
        sampling: Options of the model's sampler.
        seed: Base seed, from which every image's seed is derived.
        partial: Score the available images although some are missing.
        device: Where the model and a local judge run. None: on a GPU, if there is one.
        ema: Evaluate the run's moving average of the weights (ema.half_life).

    Returns:
        The contents of results.json. None if no step wrote it, and on ranks other than 0.

    Raises:
        EvaluationError: Images, records, a judge or the disk failed. It is a ValueError; finished outputs are kept.
        RecipeError: The recipe cannot be read, its model lacks the ability, or the device cannot be used.
    """
    from reca.eval.errors import EvaluationError
    from reca.eval.evaluation import evaluate
    from reca.eval.settings import open_settings

    if isinstance(steps, str):
        raise EvaluationError(f"steps={steps!r} must be a list; write steps=[{steps!r}]")
    for name, options in (("judge_options", judge_options), ("sampling", sampling)):
        if not isinstance(options, Mapping | None):
            raise EvaluationError(f"{name}={options!r} must be a dict, such as {{'steps': 8}}")
    if not isinstance(judge, str | None):
        raise EvaluationError(f"judge must be a text, NAME or NAME:ARGUMENT, got {type(judge).__name__}")
    for name, number in (("images_per_item", images_per_item or 0), ("limit", limit or 0), ("seed", seed)):
        if not isinstance(number, Integral):
            raise EvaluationError(f"{name}={number!r} must be a whole number")

    def path(given: str | Path | None) -> Path | None:
        return None if given is None else Path(expand_home(str(given)))

    settings = open_settings(
        suite, path(data), steps=tuple(steps), judge=judge, judge_options=judge_options or {},
        images_per_item=images_per_item, limit=limit, sampling=sampling or {}, seed=seed, partial=partial,
    )  # fmt: skip
    source = _path(source)
    return evaluate(settings, source, overrides, path(against), path(images), path(records), path(out), device, ema)
