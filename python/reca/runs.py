"""How runs follow each other: what may change when a run goes on, which run another starts from, what it has made."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from reca import checkpoint
from reca.config import Recipe, RecipeError, as_dict, load_recipe
from reca.data.loader import SPECS
from reca.models import umm
from reca.models.base import Adapter

# Keys that change no bit of the result, or only how sums are rounded.
FREE = (
    "run_dir", "log.*", "checkpoint.*", "parallel.*",
    "train.updates", "train.threads", "train.compile", "train.activation_checkpointing", "train.max_skips",
    "data.workers", "data.decoder", "data.prefetch", "data.max_bad_fraction", "data.cache",
)  # fmt: skip
# Keys that name something on a disk, which may have moved: `identity` compares what is there instead.
BY_CONTENT = (
    "data.images",
    "data.conversations",
    "data.captions",
    "data.image_root",
    "data.template*",
    "train.init_from",
)
HEAD = 1 << 20  # bytes at the start of a weight file that tell it from others: headers, names, shapes, first values


def identity(recipe: Recipe, sources: Mapping[str, Any], templates: list[str]) -> dict[str, Any]:
    """What a run is made from, by content and wherever it lies: JSON-able, kept with every checkpoint.

    sources: the samples of every active kind.
    """
    found = {f"data.{SPECS[kind]}": [len(sources[kind]), sources[kind].identity()] for kind in recipe.active_kinds()}
    if "reca" in recipe.active_kinds():
        found["data.templates"] = _digest("\n".join(templates).encode())
    found |= {f"model.{name}": _fingerprint(value) for name, value in files(recipe).items()}
    if recipe.train.init_from is not None:
        folder = checkpoint.newest(Path(recipe.train.init_from))
        found["train.init_from"] = folder and _digest((folder / checkpoint.MARKER).read_bytes())
    return found


def reject_changed(recipe: Recipe, run_dir: Path, state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with what makes another result.

    state: of the checkpoint to go on from, with its recipe and its identity. now: the identity of this start.
    Raises RecipeError that names every such key with both values.
    """
    before, old, new = state["identity"], _flat(state["recipe"]), _flat(as_dict(recipe))
    free = [*FREE, *BY_CONTENT, *before, *now, "optim.decay_updates"]
    for kind in SPECS:
        if not old.get(f"objective.{kind}.weight") and not new[f"objective.{kind}.weight"]:
            free.append(f"objective.{kind}.*")
    if new["objective.mean"] == "update":
        free.append("objective.*.micro_batch")
    changed = [key for key in new if old.get(key) != new[key] and not any(fnmatchcase(key, f) for f in free)]
    if "umm" in changed:
        changed = ["umm"]  # no other key can be compared
    told = [f"{key} {old.get(key)!r} -> {new[key]!r}" for key in changed]
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and "umm" not in changed:
            counts = _counts(before.get(key), now.get(key))
            told.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r} has other contents{counts}")
    if told:
        raise RecipeError(
            f"{run_dir} holds a run of another recipe ({'; '.join(told)}). Use another run_dir, or undo the change"
        )


def finished(recipe: Recipe) -> int | None:
    """The updates of a run that has no more to make; None for any other. Raises RecipeError as `reject_changed`."""
    newest = checkpoint.newest(Path(recipe.run_dir))
    if newest is None or int(newest.name) < recipe.train.updates:
        return None
    state = checkpoint.read_state(newest)
    reject_changed(recipe, Path(recipe.run_dir), state, state["identity"])
    return state["update"]


def schedule_end(recipe: Recipe, state: Mapping[str, Any] | None) -> int:
    """The update at which the learning rate's schedule ends.

    A run that is continued keeps the end it began with, however many updates it is to make now, unless
    optim.decay_updates tells another.
    """
    if recipe.optim.decay_updates is not None:
        return recipe.optim.decay_updates
    return recipe.train.updates if state is None else state["schedule_end"]


def load_trained(run_dir: Path, recipe: Recipe, device: torch.device | str = "cpu") -> Adapter:
    """The model of a run: the weights it started from with its newest checkpoint on top."""
    adapter = umm(recipe.umm).Adapter.load(recipe.model, device)
    inherit(adapter, recipe)
    checkpoint.overlay(run_dir, adapter)
    return adapter.eval()


def inherit(adapter: Adapter, recipe: Recipe) -> None:
    """Put what the runs before this one have trained over the published weights: `train.init_from`, and its own."""
    before = parent(recipe)
    if before is not None:
        inherit(adapter, before)
        checkpoint.overlay(Path(recipe.train.init_from), adapter)


def parent(recipe: Recipe) -> Recipe | None:
    """The recipe of the run that `train.init_from` names, if it names one.

    Raises RecipeError when it is no run, or one of other published files; CheckpointError when it has saved nothing.
    """
    if recipe.train.init_from is None:
        return None
    folder = Path(recipe.train.init_from)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"train.init_from={folder} is no folder of a run: it has no recipe.yaml")
    before = load_recipe(folder / "recipe.yaml")
    ours, theirs = ({"umm": r.umm} | files(r) for r in (recipe, before))
    if ours != theirs and {k: _fingerprint(v) for k, v in ours.items()} != {
        k: _fingerprint(v) for k, v in theirs.items()
    }:
        differences = ", ".join(
            f"{k} {theirs.get(k)!r} -> {ours.get(k)!r}" for k in ours | theirs if ours.get(k) != theirs.get(k)
        )
        raise RecipeError(
            f"train.init_from={folder} is a run of other published files than this recipe ({differences}); both must "
            "name the same umm and the same files"
        )
    if checkpoint.newest(folder) is None:
        raise checkpoint.CheckpointError(f"{folder} has no complete checkpoint; did the run save one?")
    return before


def files(recipe: Recipe) -> dict[str, str]:
    """The files and folders a model comes from: its free-text keys."""
    free = (f.name for f in fields(recipe.model) if not f.metadata.get("choices"))
    values = {name: getattr(recipe.model, name) for name in free}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _fingerprint(source: str) -> str:
    """What tells a weight file or a folder of them from others without reading gigabytes; a hub id is its own."""
    if "/" not in source and not Path(source).suffix:  # a word or a sentence, such as a system prompt
        return source
    path = Path(source).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return _digest(b"%d %s" % (path.stat().st_size, file.read(HEAD)))
    if path.is_dir():
        inside = sorted((p.relative_to(path).as_posix(), p.stat().st_size) for p in path.rglob("*") if p.is_file())
        return _digest(repr(inside).encode())
    return source


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _counts(before: Any, now: Any) -> str:
    return f" ({before[0]} samples, now {now[0]})" if isinstance(before, list) and isinstance(now, list) else ""
