"""The commands `reca data check` and `reca data view`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe, recipe_names
from reca.data.audit import audit, report
from reca.data.contact_sheet import contact_sheet
from reca.data.loader import open_loader
from reca.data.sources.factory import DATA_KEYS, open_sources
from reca.estimate.meta_model import build_meta
from reca.io.folders import ensure_writable, write_atomically
from reca.io.paths import exists
from reca.options.fields import RecipeError

UNUSABLE = 1  # exit code of `reca data check` when a sample cannot be used


def open_spec(spec: str, task: str | None, recipe: str | None, overrides: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe of a spec, and the tasks to inspect.

    spec: a recipe, or a value of data.images (or of the key of `task`). recipe: supplies all other settings then.
    """
    if (not exists(Path(spec)) and spec in recipe_names()) or Path(spec).suffix in (".yaml", ".yml"):
        if recipe is not None:
            raise RecipeError(f"{spec} is a recipe, and --recipe={recipe} is another: give one of them")
        loaded = load_recipe(spec, overrides)
        return loaded, [task] if task else loaded.active_tasks()
    task = task or "reca"
    return load_recipe(recipe or "show_o_512", [f"data.{DATA_KEYS[task]}={spec}", *overrides]), [task]


def check(recipe: Recipe, tasks: Sequence[str]) -> int:
    """Print an audit of each task's data, and return the exit code."""
    code = 0
    for task, source in open_sources(recipe.data, tasks, recipe.train.seed).items():
        with tqdm(total=len(source), unit="sample", leave=False, disable=None) as bar:
            found = audit(source, task == "i2t", recipe.data.workers, bar.update)
        print(f"data.{DATA_KEYS[task]} ({task})\n{report(found, getattr(source, 'skipped', None))}\n")
        if found.bad:
            code = UNUSABLE
    return code


def view(recipe: Recipe, tasks: Sequence[str], count: int, out: Path) -> list[Path]:
    """Write a contact sheet of each task's first samples, with the views of the recipe's model. Return the paths."""
    if count < 1:
        raise RecipeError(f"--count must be at least 1, got {count}")
    ensure_writable(out, "--out")
    adapter, _ = build_meta(recipe)
    written = []
    for task in tasks:
        if task not in adapter.tasks:
            raise RecipeError(f"{recipe.umm} has no {task} loss: its tasks are {', '.join(adapter.tasks)}")
        # The page lists unreadable samples, however many there are.
        config = replace(recipe.data, cache=None, workers=0, max_bad_fraction=1.0)
        loader = open_loader(config, task, adapter.views(task), seed=recipe.train.seed, micro_batch=1)
        path = out / f"{task}.html"
        page = contact_sheet(loader, min(count, len(loader.source)), f"{recipe.umm}: {task}")
        write_atomically(path, page.encode("utf-8", "backslashreplace"))  # a file name need not be UTF-8
        written.append(path)
    return written
