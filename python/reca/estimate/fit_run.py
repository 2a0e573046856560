"""What train.fit or train.micro_batch chose for a run: recorded in its folder, and kept when the run is resumed."""

import json
import logging
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from reca import distributed, units
from reca.config.recipe import Recipe
from reca.config.recipe_files import by_key, reread
from reca.estimate import memory
from reca.estimate.fit import CAST_ONCE, CHECKPOINTING, asked_by, choose, describe, value_of, with_keys
from reca.io.files import parse_json
from reca.io.folders import write_atomically
from reca.io.shape import misfit
from reca.options.fields import RecipeError
from reca.processes import own_process

log = logging.getLogger("reca")

FILE = "fit.json"  # in the run folder: what was chosen, for what, and why
SHAPE = {"asked": {str: object}, "keys": {str: object}}
DEPENDS_ON = (  # keys that a choice depends on
    "umm", "model.*", "objective.*", "lora.*", "parallel.shard", "parallel.strategy",
    "parallel.reduce_every_micro_batch",
    "ema.half_life", "optim.name", "optim.moments", "optim.offload", "optim.fused_backward", "train.roles",
    "train.frozen", "train.precision", CAST_ONCE, "train.fit", "train.fit_allow", "train.micro_batch", CHECKPOINTING,
)  # fmt: skip


def fit_on_ranks(recipe: Recipe, own_model: bool, write: Callable[[Path, bytes], object]) -> Recipe:
    """Return the recipe with what train.fit or train.micro_batch chooses, on rank 0 for all ranks.

    own_model: the run trains the recipe's model, not one that the caller passed. write: as in `fit_run`.
    Raises RecipeError.
    """
    if not (asker := asked_by(recipe)):
        return recipe
    fitted = None
    with distributed.fail_together():
        if distributed.rank() == 0:
            if not own_model:
                raise RecipeError(
                    f"{asker} needs the recipe's own model, and train was called with another: set it to null"
                )
            ranks, node = distributed.world_size(), distributed.local_world_size()
            fitted = fit_run(recipe, ranks, node, own_process.call, write)
    return distributed.all_gather(fitted)[0]


def fit_run(
    recipe: Recipe,
    gpus: int,
    node: int,
    call: Callable[..., Any],
    write: Callable[[Path, bytes], object] = write_atomically,
) -> Recipe:
    """Return the recipe with the settings that train.fit chooses, and record them in the run folder.

    A run that resumes on as many equal GPUs keeps its settings. call: runs `choose`, such as own_process.call.
    write: writes the record, at once or as soon as the start of the run is accepted.
    Raises RecipeError.
    """
    file = Path(recipe.run_dir) / FILE
    if (before := _read(file, recipe)) is not None:
        # The run's recipe.yaml contains the chosen values: restore the original ones before comparing and choosing.
        # Other values are given anew.
        chosen = [key for key, value in before["keys"].items() if value_of(recipe, key) == value]
        recipe = with_keys(recipe, {key: before["asked"][key] for key in chosen})
    asked, kept, allowed = _asked(recipe, gpus, node), {}, recipe
    if before is not None:
        changed = sorted(key for key in asked | before["asked"] if before["asked"].get(key) != asked.get(key))
        if not changed:
            log.info("%s: unchanged since the run began, %s", asked_by(recipe), describe(before["keys"]))
            return with_keys(recipe, before["keys"])
        differences = ", ".join(f"{key} {before['asked'].get(key)} -> {asked.get(key)}" for key in changed)
        patterns = ("optim.name", "optim.moments") + ("objective.*",) * (recipe.objective.mean == "micro_batch")
        kept = {  # what alters the result, unless it is given anew, which ends the run with an error
            key: value
            for key, value in before["keys"].items()
            if value_of(recipe, key) == before["asked"][key] and any(fnmatchcase(key, p) for p in patterns)
        }
        if recipe.train.fit is None and recipe.objective.mean == "micro_batch":
            log.info("%s: objective.mean=micro_batch keeps %s", asked_by(recipe), describe(kept))
            return with_keys(recipe, kept)
        allowed = with_keys(recipe, kept)
        if recipe.train.fit is not None:
            allowed.train.micro_batch = None
        log.info("%s chooses again, because of changes: %s", asked_by(recipe), differences)
    choice = call(choose, allowed, gpus, node, asked["card"], None, before is not None)
    keys = kept | choice.keys
    why = (
        f"{units.size(choice.memory.total)} predicted, {units.size(memory.needed(choice.memory.total))} with a reserve "
        f"for {memory.NOT_COUNTED}, of {units.size(asked['card'])}"
    )
    log.info("%s chose %s: %s", asked_by(recipe), describe(keys), why)
    written = {"asked": asked, "keys": keys, "memory": choice.memory._asdict(), "why": why}
    write(file, json.dumps(written, indent=1).encode())
    return with_keys(recipe, keys)


def recorded(recipe: Recipe) -> Recipe:
    """Return the recipe with the settings that were chosen for this run; unchanged if none were chosen yet."""
    before = _read(Path(recipe.run_dir) / FILE, recipe) if asked_by(recipe) else None
    return recipe if before is None else with_keys(recipe, before["keys"])


def _read(file: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Read the record of a choice; None if there is none, or the file contains something else.

    recipe: one whose keys accept the recorded values.
    """
    try:
        before = parse_json(file.read_bytes())
        if misfit(before, SHAPE) is not None:
            return None
        for values in (before["keys"], {key: before["asked"][key] for key in before["keys"]}):
            reread(with_keys(recipe, values))
        return before
    except (OSError, ValueError, LookupError, AttributeError):
        return None


def _asked(recipe: Recipe, gpus: int, node: int) -> dict[str, Any]:
    """Return everything that a choice depends on."""
    if recipe.train.fit not in (None, "auto"):
        card = units.parse_size(recipe.train.fit)
    elif torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0).total_memory
    else:
        raise RecipeError(
            f"{asked_by(recipe)}=auto needs a GPU's memory size, and torch finds no GPU: give it, as in train.fit=80GiB"
        )
    values = by_key(recipe)
    relevant = {key: values[key] for key in values if any(fnmatchcase(key, pattern) for pattern in DEPENDS_ON)}
    return {"card": card, "gpus": gpus, "node": node, **json.loads(json.dumps(relevant))}
