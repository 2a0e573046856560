"""Runs that are complete: what `reca train` finds where no step is left to train."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from reca import checkpoint, exits
from reca.config.recipe import Recipe
from reca.config.recipe_files import absolute_paths
from reca.data.sources.factory import DATA_KEYS
from reca.launcher import is_main_process
from reca.runs.folder import RunFolder
from reca.runs.lineage import COMPARED_BY_CONTENT, flattened, parent_of, reject_changed
from reca.runs.status import Status

log = logging.getLogger("reca")


def finished_steps(recipe: Recipe) -> int | None:
    """Return the number of steps of a completed run and mark its status as finished; None if it is not complete.

    The checkpoint is validated by its counters and the sizes of its files, which is fast. Data is not read: other names
    of it are a warning.
    Raises RecipeError as `reject_changed`, RunInUse if another process uses the folder.
    """
    run_dir = Path(recipe.run_dir)
    newest = checkpoint.latest(run_dir)
    if newest is None or int(newest.name) < recipe.train.steps or checkpoint.find_damage(newest, contents=False):
        return None
    state = checkpoint.read_state(newest, of_run=True)
    data = {key: value for key, value in state["fingerprint"].items() if key != "train.init_from"}
    reject_changed(recipe, run_dir, state, data | parent_of(recipe, state))
    if is_main_process():
        if renamed := _renamed_data(recipe, state):
            log.warning(
                "%s was trained with other data keys (%s). No step is left to train, so the new data is not read; set "
                "another run_dir to train with it",
                run_dir,
                "; ".join(renamed),
            )
        with contextlib.suppress(ValueError):
            if Status.read(run_dir).state == "finished":
                return state["step"]
        with contextlib.suppress(OSError), RunFolder(run_dir, recipe.train.steps) as folder:
            checkpoint.remove_partial(run_dir)
            folder.record_checkpoint(newest)
            folder.write_status("finished", exits.DONE)
            folder.close()
    return state["step"]


def _renamed_data(recipe: Recipe, state: Mapping[str, Any]) -> list[str]:
    """List the data keys of active tasks whose values differ from those of a checkpoint, with both values."""
    old, new = flattened(state["recipe"]), flattened(asdict(absolute_paths(recipe)))
    unused = {f"data.{key}" for task, key in DATA_KEYS.items() if task not in recipe.active_tasks()}
    named = [key for key in new if key.startswith("data.") and any(fnmatchcase(key, f) for f in COMPARED_BY_CONTENT)]
    return [
        f"{key} {old[key]!r} -> {new[key]!r}" for key in named if key in old.keys() - unused and old[key] != new[key]
    ]
