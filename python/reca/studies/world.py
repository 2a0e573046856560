"""Studies in an embedded world: a start that is pre-trained here, and measuring by the world's own judge."""

import json
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from reca import runs
from reca.demo.captions import caption
from reca.demo.measure import Measured, measure, spacing
from reca.demo.pretrain import DemoSetup, demo_setup, run_overrides, scaled
from reca.demo.pretrain.optimize import save_as_run
from reca.demo.scene import Scene, Thing
from reca.demo.world import load_world
from reca.image_grid import make_grid
from reca.models.base import Adapter
from reca.recipe_files import load_recipe
from reca.studies.task import Asked, Task

MEASURES = ("overall", "seen", "held-out", "single", "two", "position", "understanding")


def recipe(asked: Asked) -> str:
    """Name the recipe of a model. Raises RecipeError for a world that is none, or has not the model."""
    return _setup(asked).recipe


def filled(asked: Asked, override: str, seed: int) -> str:
    """Put the world's data in place of {unlabeled}, {captioned} and {understood}."""
    world = load_world(asked.world)
    return override.format(**{name: world.spec(name, seed) for name in ("captioned", "understood", "unlabeled")})


def init_override(asked: Asked | Task, start: Path) -> str:
    """Return the override by which a recipe starts from a pre-trained model."""
    return _setup(asked).init_override.format(folder=start)


def cache_override(asked: Asked) -> list[str]:
    """Return the override by which arms share the features of a frozen encoder, if the model has one here."""
    return [f"data.cache={asked.out / 'features'}"] if _setup(asked).cached else []


def overrides(asked: Asked, name: str, seed: int) -> tuple[str, ...]:
    """Return what every arm of a recipe is run with."""
    world = load_world(asked.world)
    captions = world.spec("unlabeled", seed, "sparse")
    return *run_overrides(name, world, seed, asked.scale), f"data.captions={captions}"


def _setup(asked: Asked | Task) -> DemoSetup:
    return demo_setup(asked.umm, load_world(asked.world))


def make_start(task: Task, progress: Callable[[int], None]) -> list[tuple[int, float]]:
    """Pre-train a model and save it, or make a variant of one that is there. Returns the curve of its loss."""
    shutil.rmtree(task.folder, ignore_errors=True)
    if task.variant is not None:
        VARIANTS[task.variant](task)
        return []
    curve: list[tuple[int, float]] = []

    def record(step: int, loss: float) -> None:
        if step % 10 == 0:
            curve.append((step, loss))
            progress(step)

    task.folder.mkdir(parents=True)
    _setup(task).pretrain(load_recipe(task.recipe, task.of_start), task.seed, task.folder, task.scale, record)
    return curve


def start_steps(task: Task) -> int:
    return _setup(task).steps if task.scale == 1 else scaled(_setup(task).steps, task.scale)


def load_start(task: Task, folder: Path) -> Adapter:
    """Load a pre-trained model."""
    return runs.load_start(load_recipe(task.recipe, [*task.of_start, init_override(task, folder)]))


def _swap_red_and_blue(task: Task) -> None:
    """Save the start with an encoder that takes red for blue: the first and the last input channel change places."""
    origin = task.folder.with_name(task.folder.name.removesuffix(f"-{task.variant}"))
    model = load_start(task, origin)
    roles = model.roles()
    towers = {name for name, role in roles.items() if role == "und_encoder"}
    modules = dict(model.named_modules())
    swapped = 0
    with torch.no_grad():
        for name in towers:
            layer = modules[name.rpartition(".")[0]]
            if isinstance(layer, torch.nn.Conv2d) and name.endswith(".weight") and layer.in_channels == 3:
                layer.weight.copy_(layer.weight.flip(1))
                swapped += 1
    if swapped != 1:
        raise ValueError(f"{task.umm} has {swapped} encoders that read three channels by a convolution, expected 1")
    if _setup(task).init_override.startswith("model.weights="):
        model.export(task.folder)
    else:
        save_as_run(model, load_recipe(task.recipe, task.of_start), task.folder, 1)


VARIANTS: dict[str, Callable[[Task], None]] = {"red_is_blue": _swap_red_and_blue}


def measured(model: Adapter, task: Task) -> dict[str, Any]:
    """Measure a model: {name: {"value" in percent, "hits", "trials"}}, and write images.png beside the run."""
    world = load_world(task.world)
    found = measure(model, world, task.seed, _setup(task).sampling, spacing(task.scale))
    task.folder.mkdir(parents=True, exist_ok=True)
    _write_images(found, world.held_out(task.seed), task.folder)
    named = {name: f"{name}, all" if name in world.categories else name for name in MEASURES}
    rates = {name: found.rates[key] for name, key in named.items() if key in found.rates}
    measures: dict[str, Any] = {
        name: {"value": 100 * rate.share, "hits": rate.hits, "trials": rate.trials} for name, rate in rates.items()
    }
    return {"overall": _overall(found, world.categories)} | measures


def _overall(found: Measured, categories: Sequence[str]) -> dict[str, Any]:
    """Return the mean over categories, with its interval from theirs (Zou and Donner 2008)."""
    rates = [found.rates[f"{name}, all"] for name in categories]
    bounds = [rate.wilson() for rate in rates]
    below = math.hypot(*(rate.share - low for rate, (low, _) in zip(rates, bounds, strict=True))) / len(rates)
    above = math.hypot(*(high - rate.share for rate, (_, high) in zip(rates, bounds, strict=True))) / len(rates)
    return {"value": 100 * found.overall, "interval": [100 * (found.overall - below), 100 * (found.overall + above)]}


def _write_images(found: Measured, things: Collection[Thing], folder: Path) -> None:
    """Write what the model draws for held-out pairs, the same prompts of every arm, chosen by place."""
    held_out = {caption(Scene((thing,))) for thing in things}
    chosen = {text: (image, hit) for text, image, hit in found.samples if text in held_out}
    shown = dict(list(chosen.items())[1::2]) or chosen
    if shown:
        make_grid([image for image, _ in shown.values()], columns=len(shown)).save(folder / "images.png")
        prompts = [{"prompt": text, "hit": hit} for text, (_, hit) in shown.items()]
        (folder / "images.json").write_text(json.dumps(prompts))
