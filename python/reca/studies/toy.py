"""Studies on a toy dataset: pre-training, and measurement by the dataset's own judge."""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from reca.config.recipe_files import load_recipe
from reca.demo.measure import Measured, measure, spacing
from reca.demo.pretrain import DemoSetup, demo_setup, run_overrides, scaled
from reca.demo.pretrain.optimize import save_as_run
from reca.io.image_grid import make_grid
from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.runs import lineage
from reca.studies.task import Asked, Task
from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import load_dataset
from reca.toy_datasets.scene import Scene, Thing

SOURCES = ("captioned", "understood", "unlabeled")
MEASURES = ("overall", "seen", "held-out", "single", "two", "position", "understanding")


def recipe(asked: Asked) -> str:
    """Return the recipe name for a model. Raises RecipeError if the toy dataset is unknown or lacks the model."""
    return _setup(asked).recipe


def filled(asked: Asked, override: str, seed: int) -> str:
    """Replace {unlabeled}, {captioned} and {understood} by the toy dataset's sources.

    Raises RecipeError for another {name}.
    """
    dataset = load_dataset(asked.dataset)
    for name in SOURCES:  # str.format would fail on braces that group keys
        override = override.replace(f"{{{name}}}", dataset.spec(name, seed))
    if unknown := re.search(r"\{\w+\}", override):
        there = ", ".join(f"{{{name}}}" for name in SOURCES)
        raise RecipeError(f"{override}: there is no {unknown[0]}; the sources of a toy dataset are {there}")
    return override


def init_override(asked: Asked | Task, folder: Path) -> str:
    """Return the override that makes a recipe start from a pre-trained model."""
    return _setup(asked).init_override.format(folder=folder)


def pretraining_overrides(asked: Asked) -> tuple[str, ...]:
    """Return the overrides for pre-training and all variants."""
    return _setup(asked).overrides


def cache_override(asked: Asked) -> list[str]:
    """Return the override that lets variants share cached features of a frozen encoder; [] without such an encoder."""
    return [f"data.cache={asked.out / 'features'}"] if _setup(asked).cached else []


def overrides(asked: Asked, name: str, seed: int) -> tuple[str, ...]:
    """Return the overrides common to all variants."""
    return run_overrides(name, load_dataset(asked.dataset), seed, asked.scale)


def _setup(asked: Asked | Task) -> DemoSetup:
    return demo_setup(asked.umm, load_dataset(asked.dataset))


def pretrain(task: Task, progress: Callable[[int], None]) -> list[tuple[int, float]]:
    """Pre-train and save a model, or modify a saved one. Returns the loss curve."""
    shutil.rmtree(task.folder, ignore_errors=True)
    if task.modification is not None:
        MODIFICATIONS[task.modification](task)
        return []
    curve: list[tuple[int, float]] = []

    def record(step: int, loss: float) -> None:
        if step % 10 == 0:
            curve.append((step, loss))
            progress(step)

    task.folder.mkdir(parents=True)
    _setup(task).pretrain(load_recipe(task.recipe, task.of_pretraining), task.seed, task.folder, task.scale, record)
    return curve


def pretraining_steps(task: Task) -> int:
    return scaled(_setup(task).steps, task.scale)


def load_pretrained(task: Task, folder: Path) -> Adapter:
    """Load a pre-trained model."""
    return lineage.load_start(load_recipe(task.recipe, [*task.of_pretraining, init_override(task, folder)]))


def _red_is_blue(task: Task) -> None:
    """Save the pre-trained model with an encoder whose red and blue channels are swapped."""
    origin = task.folder.with_name(task.folder.name.removesuffix(f"-{task.modification}"))
    model = load_pretrained(task, origin)
    swap_red_and_blue(model)
    if _setup(task).init_override.startswith("model.weights="):
        model.export(task.folder)
    else:
        save_as_run(model, load_recipe(task.recipe, task.of_pretraining), task.folder, 1)


def swap_red_and_blue(model: Adapter) -> None:
    """Swap the first and last input channels of the understanding encoder.

    Its first layer is a convolution or, in BAGEL's SigLIP, a linear layer on patches with channels last.
    Raises ValueError if the model does not have exactly one such layer.
    """
    roles, swapped = model.roles(), []
    for name, layer in model.named_modules():
        if roles.get(f"{name}.weight") != "und_encoder":
            continue
        if isinstance(layer, torch.nn.Conv2d) and layer.in_channels == 3:
            swapped.append((layer.weight, layer.weight.flip(1)))
        elif isinstance(layer, torch.nn.Linear) and name.endswith("patch_embedding"):
            swapped.append((layer.weight, layer.weight.unflatten(1, (-1, 3)).flip(2).flatten(1)))
    if len(swapped) != 1:
        raise ValueError(f"{type(model).__module__} has {len(swapped)} layers with three input channels, expected 1")
    with torch.no_grad():
        for weight, other in swapped:
            weight.copy_(other)


MODIFICATIONS: dict[str, Callable[[Task], None]] = {"red_is_blue": _red_is_blue}


def measured(model: Adapter, task: Task) -> dict[str, Any]:
    """Measure a model: {name: {"value" in percent, "hits", "trials"}}. Write images.png and images.json."""
    dataset = load_dataset(task.dataset)
    found = measure(model, dataset, task.seed, _setup(task).sampling, spacing(task.scale), task.evaluations.draws)
    task.folder.mkdir(parents=True, exist_ok=True)
    _write_images(found, dataset.held_out(task.seed), task.folder)
    named = {name: f"{name}, all" if name in dataset.categories else name for name in MEASURES}
    rates = {name: found.rates[key] for name, key in named.items() if key in found.rates}
    measures: dict[str, Any] = {
        name: {"value": 100 * rate.share, "hits": rate.hits, "trials": rate.trials} for name, rate in rates.items()
    }
    return {"overall": _overall(found, dataset.categories)} | measures


def _overall(found: Measured, categories: Sequence[str]) -> dict[str, Any]:
    """Return the mean over categories, with an interval combined from theirs (Zou and Donner 2008)."""
    rates = [found.rates[f"{name}, all"] for name in categories]
    bounds = [rate.wilson() for rate in rates]
    below = math.hypot(*(rate.share - low for rate, (low, _) in zip(rates, bounds, strict=True))) / len(rates)
    above = math.hypot(*(high - rate.share for rate, (_, high) in zip(rates, bounds, strict=True))) / len(rates)
    interval = [100 * (found.overall - below), 100 * (found.overall + above)]
    return {"value": 100 * found.overall, "interval": interval, "percent": True}


def _write_images(found: Measured, things: Collection[Thing], folder: Path) -> None:
    """Write the images for held-out pairs: every second prompt, the same for all variants."""
    held_out = {caption(Scene((thing,))) for thing in things}
    chosen = {text: (image, hit) for text, image, hit in found.samples if text in held_out}
    shown = dict(list(chosen.items())[1::2]) or chosen
    if shown:
        make_grid([image for image, _ in shown.values()], columns=len(shown)).save(folder / "images.png")
        prompts = [{"prompt": text, "hit": hit} for text, (_, hit) in shown.items()]
        (folder / "images.json").write_text(json.dumps(prompts))
