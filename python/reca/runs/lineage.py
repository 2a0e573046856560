"""Lineage of runs: what may change on resume, which run a run starts from, and loading of trained weights."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from reca import checkpoint, distributed
from reca.config.recipe import Recipe
from reca.config.recipe_files import UnknownRecipe, absolute_paths, by_key, load_recipe, walk
from reca.data.sources.factory import DATA_KEYS
from reca.io.paths import exists, is_dir, is_file
from reca.models import umm_package
from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.runs.published import digest, file_fingerprint, published_files
from reca.training import lora
from reca.training.finite_weights import check_finite

# Keys that do not change the result, or only the rounding of sums.
RESULT_NEUTRAL_KEYS = (
    "run_dir", "log.*", "eval.*", "checkpoint.*", "ema.*", "parallel.*",
    "train.steps", "train.threads", "train.compile", "train.activation_checkpointing", "train.cast_once",
    "train.max_skips", "train.deterministic", "train.fit", "train.fit_allow", "train.micro_batch",
    "optim.offload", "optim.fused_backward",
    "data.workers", "data.decoder", "data.prefetch", "data.max_bad_fraction", "data.cache",
)  # fmt: skip
# Keys that name files, which may have moved: `fingerprint` compares their contents instead.
COMPARED_BY_CONTENT = (
    "data.images",
    "data.conversations",
    "data.captions",
    "data.image_root",
    "data.columns.*",
    "data.template*",
    "train.init_from",
)
HELD_OUT_KEYS = ("eval.holdout", "eval.holdout_from", "eval.seed")  # they determine the remaining training images
OF_A_MACHINE = {"train.threads", "data.workers"}  # keys that may differ between the ranks of a run


def fingerprint(
    recipe: Recipe, sources: Mapping[str, Any], templates: list[str], state: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Identify the inputs of a run (data, templates, model files, parent run) by content, not by path.

    The result is JSON-able and is saved with every checkpoint. sources: data sources of every active task. state: state
    of the checkpoint to resume from. If it names the same train.init_from, its digest is reused: the parent run may
    have continued since. The parent of a new run is identified once it is loaded, by `load_parent`.
    """
    found: dict[str, Any] = {
        f"data.{DATA_KEYS[task]}": [len(sources[task]), sources[task].identity()] for task in recipe.active_tasks()
    }
    if "reca" in recipe.active_tasks():
        found["data.templates"] = digest("\n".join(templates).encode())
    found |= {f"model.{name}": file_fingerprint(value) for name, value in published_files(recipe).items()}
    return found if state is None else found | parent_of(recipe, state)


def parent_of(recipe: Recipe, state: Mapping[str, Any]) -> dict[str, Any]:
    """Identify `train.init_from` when a run is resumed, which does not read it: its folder may be gone by now."""
    if recipe.train.init_from is None:
        return {}
    same = state["recipe"]["train"]["init_from"] == absolute_paths(recipe).train.init_from
    return {"train.init_from": state["fingerprint"].get("train.init_from") if same else parent_digest(recipe)}


def parent_digest(recipe: Recipe, run_dir: Path | None = None) -> str | None:
    """Return a digest of the checkpoint of `train.init_from` that `parent_checkpoint` finds; None if there is none."""
    folder = parent_checkpoint(recipe, run_dir)
    return checkpoint.digest(folder) if folder else None


def parent_checkpoint(recipe: Recipe, run_dir: Path | None = None) -> Path | None:
    """Return the checkpoint `train.init_from`, or the newest of that run, or the one the run in `run_dir` started from.

    Returns None if train.init_from is not set, or the checkpoint is gone.
    """
    if recipe.train.init_from is None or (trained := trained_source(recipe.train.init_from)) is None:
        return None
    complete = checkpoint.list_complete(trained[0])
    if not is_run(recipe.train.init_from):
        complete = [folder for folder in complete if folder == trained[1]]
    if run_dir is not None and (own := checkpoint.list_complete(run_dir)):
        sound = (folder for folder in reversed(own) if not checkpoint.find_damage(folder, contents=False))
        digest = checkpoint.read_state(next(sound, own[-1]), of_run=True)["fingerprint"].get("train.init_from")
        complete = [folder for folder in complete if checkpoint.digest(folder) == digest]
    return complete[-1] if complete else None


def reject_changed(recipe: Recipe, run_dir: Path, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RecipeError if a run would be resumed with keys or contents that change its result.

    state: state of the checkpoint to resume from, with its recipe and fingerprint. now: fingerprint of this start.
    The message names every such key with both values.
    """
    before, new = state["fingerprint"], flattened(asdict(absolute_paths(recipe)))
    # Keys that the version that wrote the checkpoint did not have count as having their default.
    old = flattened(asdict(Recipe(umm=recipe.umm, model=type(recipe.model)()))) | flattened(state["recipe"])
    free = [*RESULT_NEUTRAL_KEYS, *COMPARED_BY_CONTENT, *before, *now, "optim.decay_steps"]
    for task in DATA_KEYS:
        if not old.get(f"objective.{task}.weight") and not new[f"objective.{task}.weight"]:
            free.append(f"objective.{task}.*")
    if new["objective.mean"] == "batch":
        free += ["objective.*.micro_batch", "objective.*.max_tokens"]
    changed = [key for key in new if old.get(key) != new[key] and not any(fnmatchcase(key, f) for f in free)]
    if "umm" in changed:
        changed = ["umm"]  # no other key can be compared
    changes = [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in changed]
    for key in sorted(before.keys() | now.keys()):
        if key.startswith("data.") and (key in before) != (key in now):
            continue  # its task was added or removed, which the key of its weight reports
        if before.get(key) == now.get(key) or "umm" in changed:
            continue
        if key == "train.init_from" and old[key] is not None:
            changes.append(
                f"{key} {old[key]!r} -> {new[key]!r}, which is not the checkpoint that the run started from: keep the "
                "first value, which is not read again"
            )
        else:
            changes.append(f"{_content(key, old, new)} has other contents{_counts(before.get(key), now.get(key))}")
    if changes:
        raise RecipeError(
            f"{run_dir} contains a run of another recipe ({'; '.join(changes)}). Set another run_dir or undo the change"
        )


def reject_other_ranks(recipe: Recipe) -> None:
    """Raise RecipeError on ranks whose recipe differs from rank 0's, and PeerFailed on the others.

    Paths and keys in OF_A_MACHINE may differ. All ranks must call it.
    """
    paths = {key for _, f, key in walk(recipe) if f.metadata.get("path")}
    own = {key: value for key, value in by_key(recipe).items() if key not in paths | OF_A_MACHINE}
    first = distributed.all_gather(own)[0]
    with distributed.fail_together():
        if differing := sorted(key for key in first | own if first.get(key) != own.get(key)):
            changes = ", ".join(f"{key} {first.get(key)!r} -> {own.get(key)!r}" for key in differing)
            raise RecipeError(
                f"rank {distributed.rank()} on {socket.gethostname()} has a different recipe than rank 0 "
                f"({changes}): start every machine with the same command"
            )


def schedule_end(recipe: Recipe, state: Mapping[str, Any] | None) -> int:
    """Return the step at which the learning-rate schedule ends.

    A resumed run keeps its original end even if train.steps has changed, unless optim.decay_steps is set.
    """
    if recipe.optim.decay_steps is not None:
        return recipe.optim.decay_steps
    return recipe.train.steps if state is None else state["schedule_end"]


def resume_warnings(recipe: Recipe, state: Mapping[str, Any], ranks: int) -> list[str]:
    """List permitted changes since the checkpoint that affect the rest of the run.

    state: state of the checkpoint. ranks: world size of this start.
    """
    found, end, before = [], schedule_end(recipe, state), state["schedule_end"]
    if recipe.optim.schedule != "constant" and end != before:
        found.append(f"the learning-rate schedule now ends at step {end}; before it was step {before}")
    elif recipe.optim.schedule != "constant" and end < recipe.train.steps:
        found.append(
            f"train.steps={recipe.train.steps} goes beyond the learning-rate schedule, which still ends at step {end}; "
            f"optim.decay_steps={recipe.train.steps} extends it"
        )
    if recipe.objective.mean == "micro_batch" and ranks != state["ranks"]:
        found.append(
            "objective.mean=micro_batch depends on the split of a step into micro-batches, and the number of processes "
            f"changed from {state['ranks']} to {ranks}"
        )
    average = state.get("ema")
    if recipe.ema.half_life and (not average or average["half_life"] != recipe.ema.half_life):
        before = f"with ema.half_life={average['half_life']:g}" if average else "without an EMA"
        found.append(
            f"the run was trained {before} so far: a new EMA starts, which averages only the steps from here on"
        )
    return found


def is_run(source: str | Path) -> bool:
    """Tell whether `source` is a run folder, by its recipe.yaml."""
    return is_file(Path(source) / "recipe.yaml")


def trained_source(source: str | Path) -> tuple[Path, Path | None] | None:
    """Split a run folder, or the folder of one of its checkpoints, into the run and the checkpoint.

    The checkpoint is the newest one of a run folder; None if it has none. Return None for any other source. Links to a
    checkpoint, and paths relative to a folder inside the run, are followed.
    """
    path = Path(source)
    if is_run(path):
        return path, checkpoint.latest(path)
    for folder in (path, Path(os.path.realpath(path))) if is_dir(path) else ():
        run = folder.parent.parent
        if folder.parent.name == "checkpoints" and folder.name.isdecimal() and is_run(run):
            return run, folder
    return None


def recipe_of(source: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe by name or path, or the recipe of a run, given as its folder or that of a checkpoint."""
    trained = trained_source(source)
    try:
        return load_recipe(trained[0] / "recipe.yaml" if trained else source, overrides)
    except UnknownRecipe as error:
        # A bare name may be a misspelt recipe, with a run as working directory. A number is none.
        named = Path(source).name == str(source) and not str(source).isdecimal()
        if (exists(Path(source)) or not named) and (hint := inside_run(Path(source))):
            raise RecipeError(f"{str(source)!r} {hint}") from error
        export = f" (an export is loaded by its recipe, with model.weights={source})" if is_dir(Path(source)) else ""
        raise RecipeError(f"{str(source)!r} is not a run folder{export}, and there is {error}") from error


def inside_run(path: Path) -> str:
    """Say which run folder contains a path, and which checkpoints it has; empty if there is no such folder."""
    run = next((folder for folder in (*path.parents, *path.absolute().parents) if is_run(folder)), None)
    if run is None:
        return ""
    steps = ", ".join(folder.name for folder in checkpoint.list_complete(run)) or "none"
    return (
        f"is inside the run folder {str(run)!r}: pass that folder, or one of its checkpoints as "
        f"{run}/checkpoints/STEP (there are: {steps})"
    )


def _find_valid(source: Path) -> Path:
    """Find the latest valid checkpoint of a run, or check the one that `source` is. Raises CheckpointError."""
    trained = trained_source(source)
    return checkpoint.find_valid(source, None if is_run(source) else trained[1] if trained else source)


def load_trained(source: Path, recipe: Recipe, device: torch.device | str = "cpu", ema: bool = False) -> Adapter:
    """Load the trained model of a run: the published weights, overwritten by a checkpoint.

    source: the run folder, for the newest checkpoint that is valid, or the folder of a checkpoint.
    ema: load the exponential moving average of the trained parameters instead of their last values.
    """
    adapter = umm_package(recipe.umm).Adapter.load(recipe.model, device)
    if recipe.lora.rank:
        # bf16 base weights need a bf16 autocast throughout, which only training has.
        lora.choose_trained(adapter, replace(recipe, lora=replace(recipe.lora, base_dtype=None)))
    adapter.inherited = checkpoint.load_weights(_find_valid(source), adapter, ema)
    check_finite(adapter)
    return adapter.eval()


def loaded_checkpoint(source: str | Path, adapter: Adapter) -> Path | None:
    """Return the checkpoint that `load_trained` has read, which is not the newest of a run that goes on or is damaged.

    Return None if it is gone by now, or if the source is not trained.
    """
    if (trained := trained_source(source)) is None or adapter.state is None:
        return None
    return next((f for f in checkpoint.list_complete(trained[0]) if int(f.name) == adapter.state["step"]), None)


def load_start(recipe: Recipe, device: torch.device | str = "cpu", run_dir: Path | None = None) -> Adapter:
    """Load the model that a run of this recipe starts from: the published weights, or those of `train.init_from`.

    run_dir: the run, if it has started. Its parent may have trained on since.
    """
    adapter = umm_package(recipe.umm).Adapter.load(recipe.model, device)
    load_parent(adapter, recipe, run_dir)
    check_finite(adapter)
    return adapter.eval()


def load_parent(adapter: Adapter, recipe: Recipe, run_dir: Path | None = None) -> str | None:
    """Load the checkpoint `train.init_from`, or the newest of that run, over the published weights, if it is set.

    Returns its digest, as `parent_digest`: that run may save another checkpoint meanwhile.

    The parent's LoRA is merged into the weights unless this run continues it.
    adapter: the model with the LoRA that the recipe requests. run_dir: load the checkpoint that this run started from.
    Raises CheckpointError if it is gone.
    """
    if recipe.train.init_from is None:
        return None
    folder = Path(recipe.train.init_from)
    with distributed.fail_together():
        before = _parent_recipe(recipe)
        started = None if run_dir is None else parent_checkpoint(recipe, run_dir)
        if run_dir is not None and started is None:
            raise checkpoint.CheckpointError(
                f"train.init_from={folder} no longer contains the checkpoint that {run_dir} started from, so its base "
                "model cannot be loaded; restore that checkpoint"
            )
    found = _find_valid(folder) if started is None else checkpoint.find_valid(folder, started)
    if before.lora.rank and not lora.continues(before, recipe):
        adapter.inherited = checkpoint.load_lora(found, adapter, before.lora)
    else:
        adapter.inherited = checkpoint.load_weights(found, adapter)
    if recipe.lora.rank and not lora.continues(before, recipe):
        with distributed.fail_together():  # each rank checks its own rows
            lora.reset(adapter, recipe.train.seed)  # DoRA magnitudes must match the loaded weights
    return adapter.state["digest"]


def _parent_recipe(recipe: Recipe) -> Recipe:
    """Read the recipe of `train.init_from`. Raises RecipeError if that is neither a run nor a checkpoint of one."""
    assert recipe.train.init_from is not None
    folder = Path(recipe.train.init_from)
    if (trained := trained_source(folder)) is None:
        other = "is not a run folder: it has no recipe.yaml. If "
        if is_dir(folder):
            other += f"it is an export, write model.weights={folder} instead"
        else:
            other += "the run was moved, pass its new place as train.init_from"
        raise RecipeError(f"train.init_from={folder} {inside_run(folder) or other}")
    return load_recipe(trained[0] / "recipe.yaml")


def check_parent(recipe: Recipe, model: Adapter) -> None:
    """Check that this run can start from `train.init_from`, if it is set.

    model: the recipe's model, with or without weights.
    Raises RecipeError if it is not a run or uses other published files; CheckpointError if it has no complete
    checkpoint or its checkpoint does not fit the model.
    """
    if recipe.train.init_from is None:
        return
    folder, before = Path(recipe.train.init_from), _parent_recipe(recipe)
    ours, theirs = ({"umm": r.umm} | published_files(r) for r in (recipe, before))
    if ours != theirs and {k: file_fingerprint(v) for k, v in ours.items()} != {
        k: file_fingerprint(v) for k, v in theirs.items()
    }:
        differences = ", ".join(
            f"{k} {theirs.get(k)!r} -> {ours.get(k)!r}" for k in ours | theirs if ours.get(k) != theirs.get(k)
        )
        raise RecipeError(
            f"train.init_from={folder} is a run with other published files than this recipe ({differences}); both must "
            "use the same umm and the same files"
        )
    newest = parent_checkpoint(recipe)
    if newest is None:
        wrong = "has no complete checkpoint" if is_run(folder) else "is not a complete checkpoint"
        raise checkpoint.CheckpointError(f"train.init_from={folder} {wrong}; wait until the run has saved one")
    if not (damage := checkpoint.find_damage(newest, contents=False)):
        checkpoint.check_fit(newest, model, mergeable=not lora.continues(before, recipe))
    elif not is_run(folder):
        raise checkpoint.CheckpointError(f"train.init_from={folder} is damaged ({damage}); pass another one of its run")


def flattened(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _content(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the keys whose contents changed, with old and new values if these differ."""
    keys = {"data.templates": [key, "data.template_count"], "data.images": [key, *HELD_OUT_KEYS]}.get(key, [key])
    differing = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]
    return " and ".join(differing) or f"{key}={new.get(key)!r}"


def _counts(before: Any, now: Any) -> str:
    if not (isinstance(before, list) and isinstance(now, list)):
        return ""
    if before[0] == now[0]:
        return f" ({now[0]} samples as before, but other ones: renamed, replaced or repaired files count as changed)"
    return f" ({before[0]} samples, now {now[0]})"
