"""Checkpoints of a run: torch.distributed.checkpoint in safetensors, written aside and renamed when complete.

    run_dir/checkpoints/000500/
        weights/    parameters that this run or one before it has changed, one file per rank, reshardable
        optimizer/  optimizer state, likewise
        state.json  counters
        COMPLETE    written last: size and SHA-256 of every file above

Parameters that no run has changed are not saved: they come from `model.weights`. A checkpoint needs no other run: the
one that train.init_from names may be continued, moved or removed. Reading a checkpoint runs no code: tensors are
safetensors, everything else is JSON.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from reca import distributed, exits, folders, manifest, units
from reca.models.base import Adapter

log = logging.getLogger("reca")
# One process without a process group is what a laptop has, and no reason to warn.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MARKER = "COMPLETE"
PARTIAL = ".partial"  # being written or removed; the next start removes what a killed process has left
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not belong to this run."""

    exit_code = exits.RECIPE


def list_complete(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first. Names are steps: digits, compared as numbers."""
    markers = (run_dir / "checkpoints").glob(f"*/{MARKER}")
    return sorted((m.parent for m in markers if m.parent.name.isdecimal()), key=lambda folder: int(folder.name))


def latest(run_dir: Path) -> Path | None:
    """Find the latest complete checkpoint of a run, damaged or not."""
    return next(reversed(list_complete(run_dir)), None)


def latest_valid(run_dir: Path, rename_damaged: bool = False) -> Path | None:
    """Find the latest checkpoint whose files match their checksums; None if the run has no checkpoint.

    A damaged one is logged as an error and the one before it is taken. Every rank gets the same answer.
    rename_damaged: rename damaged ones to NUMBER.damaged, so that a continued run can write these steps again.
    Raises CheckpointError when all of them are damaged; it names what to remove.
    """
    faults: dict[Path, str] = {}
    while True:
        # Of rank 0: on a network file system, the others may see a folder later.
        there = distributed.all_gather(list_complete(run_dir))[0]
        faults = {folder: fault for folder, fault in faults.items() if folder in there}  # a live run removes old ones
        if not (left := [folder for folder in there if folder not in faults]):
            break
        if fault := find_damage(left[-1]):
            faults[left[-1]] = fault
            continue
        for damaged, reason in faults.items():
            log.error("checkpoint %s is DAMAGED (%s); going back to %s", damaged, reason, left[-1])
            if rename_damaged:
                _rename_as_damaged(damaged)
        return left[-1]
    if not faults:
        return None
    reasons = "; ".join(f"{folder}: {reason}" for folder, reason in faults.items())
    raise CheckpointError(
        f"no checkpoint of {run_dir} is sound ({reasons}). Restore the files, or remove "
        f"{' and '.join(map(str, faults))} to start this run again from its first step"
    )


def find_damage(folder: Path, contents: bool = True) -> str:
    """Describe the damage to a complete checkpoint; empty when there is none.

    contents: read the files, too, and let ranks share that work; all of them must call it then.
    """
    try:
        listed = manifest.read(folder / MARKER)
        own = dict(list(listed.items())[distributed.rank() :: distributed.world_size()]) if contents else listed
        faults = manifest.damage(folder, own, contents)
    except (OSError, ValueError) as error:
        faults = [f"{MARKER} cannot be read: {error}"]
    if not contents:
        return "; ".join(faults)
    return "; ".join(dict.fromkeys(fault for part in distributed.all_gather(faults) for fault in part))


def remove_partial(run_dir: Path) -> None:
    """Remove partial checkpoints of killed processes. Only for the process that holds the run's lock."""
    for folder in (run_dir / "checkpoints").glob(f"*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def save(run_dir: Path, state: dict, adapter: Adapter, optimizer: torch.optim.Optimizer, keep: int) -> Path | None:
    """Write a checkpoint and return its folder; None, with an error in the log, if the disk cannot take it.

    Older checkpoints stay until it is complete.

    state: JSON-able, with the number of steps done as "step".
    """
    final = run_dir / "checkpoints" / f"{state['step']:06d}"
    partial = final.with_name(final.name + PARTIAL)
    moments = get_optimizer_state_dict(adapter, optimizer, options=FLAT)
    state = state | {"group_steps": [group.get("step") for group in optimizer.param_groups]}  # where apex counts
    try:
        with distributed.fail_together():
            _make_room(run_dir, partial, adapter)
        with distributed.fail_together():
            _write(partial / "weights", changed_parameters(adapter))
        with distributed.fail_together():
            _write(partial / "optimizer", _tensors(moments))
        with distributed.fail_together():
            _write_state(partial, state)
        with distributed.fail_together():
            own = _checksums(partial)
        listed = distributed.all_gather(own)
        with distributed.fail_together():
            _publish(partial, final, listed)
    except (OSError, RuntimeError) as error:
        log.error(
            "checkpoint at step %d NOT saved: %s. Earlier checkpoints are untouched; free space in %s",
            state["step"], getattr(error, "reason", None) or _first_line(error), run_dir,
        )  # fmt: skip
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return None
    if distributed.rank() == 0 and keep:
        for old in list_complete(run_dir)[:-keep]:
            try:
                _remove(old)
            except OSError as error:
                log.warning("checkpoint %s cannot be removed (%s); checkpoint.keep=%d", old, error.strerror, keep)
    return final


def load(folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Load a checkpoint's parameters (and optimizer state), on any number of ranks. Returns the counters.

    Raises CheckpointError if the checkpoint is incomplete, damaged, or holds other parameters than this run trains.
    """
    if not (folder / MARKER).exists():
        raise CheckpointError(f"{folder} is not a complete checkpoint (no {MARKER} file); use an earlier one")
    weights = changed_parameters(adapter)
    saved = _saved(folder / "weights")
    wanted = {name: tuple(value.shape) for name, value in weights.items()}
    if saved != wanted:
        differ = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{folder} does not fit the parameters this run trains: {len(differ)} differ, the first {differ[:5]}. "
            "Was model or train.train changed? Start in another run_dir, or restore the recipe"
        )
    state = read_state(folder)
    _read(folder / "weights", weights)
    if optimizer is not None:
        moments = get_optimizer_state_dict(adapter, optimizer, options=FLAT)
        _read(folder / "optimizer", _tensors(moments))
        set_optimizer_state_dict(adapter, optimizer, moments, options=FLAT)
        for group, step in zip(optimizer.param_groups, state["group_steps"], strict=True):
            if step is not None:
                group["step"] = step
    return state


def read_state(folder: Path) -> dict:
    """Read the counters of a checkpoint. Raises CheckpointError when they cannot be read."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/state.json cannot be read ({error}); remove {folder} to use the one before"
        ) from error


def load_weights(run_dir: Path, adapter: Adapter) -> frozenset[str]:
    """Load the parameters that another run has changed, whatever this run trains. Returns their names.

    Raises CheckpointError if that run has no valid checkpoint, or parameters that this model lacks.
    """
    folder = latest_valid(run_dir)
    if folder is None:
        raise CheckpointError(f"{run_dir} has no complete checkpoint; did the run save one?")
    names = check_fit(folder, adapter)
    own = dict(adapter.named_parameters())
    _read(folder / "weights", {name: own[name].detach() for name in names})
    return names


def check_fit(folder: Path, adapter: Adapter) -> frozenset[str]:
    """List a checkpoint's parameters. Raises CheckpointError if this model lacks one or has another shape of it."""
    own = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    saved = _saved(folder / "weights")
    misfits = sorted(name for name, shape in saved.items() if own.get(name) != shape)
    if misfits:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(misfits)} of its parameters are missing here or have another "
            f"shape, the first {misfits[:5]}. Both runs must name the same umm and sizes"
        )
    return frozenset(saved)


def changed_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that are not as published, by name: trained by this run or by one before it.

    The tensors themselves, so that loading fills them.
    """
    return {name: p.detach() for name, p in adapter.named_parameters() if p.requires_grad or name in adapter.inherited}


def size(adapter: Adapter) -> int:
    """Count the bytes of a checkpoint: the changed parameters, and AdamW's two moments of each that is trained."""
    trained = [p for p in adapter.parameters() if p.requires_grad]
    return sum(p.numel() * p.element_size() for p in (*changed_parameters(adapter).values(), *trained, *trained))


def free_space(run_dir: Path) -> int:
    """Count the bytes free where a run's checkpoints go, which may be linked to another disk."""
    return shutil.disk_usage(run_dir / "checkpoints").free


def _tensors(state: dict) -> dict[str, Tensor]:
    """Return the tensors of a flat optimizer state. All else are settings, which come from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _saved(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of the tensors in a folder of shards.

    Raises CheckpointError for shards that cannot be read, or that were put there by another hand.
    """
    listed = _reading(folder, lambda: manifest.read(folder.parent / MARKER))
    strangers = sorted(p.name for p in folder.glob("*.safetensors") if f"{folder.name}/{p.name}" not in listed)
    if strangers:
        raise CheckpointError(f"{folder} holds {strangers[0]}, which is no file of this checkpoint: remove it")
    metadata = _reading(folder, lambda: HuggingFaceStorageReader(str(folder)).read_metadata())
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    if tensors:
        _reading(folder, lambda: dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder))))


def _reading(folder: Path, read: Callable):
    try:
        return read()
    except (Exception, dcp.api.CheckpointException) as error:  # of safetensors, the disk, DCP: a BaseException
        raise CheckpointError(
            f"{folder} cannot be read ({type(error).__name__}: {_first_line(error)}); remove {folder.parent} to use "
            "the checkpoint before it"
        ) from error


def _first_line(error: BaseException) -> str:
    """Return the message of the first rank that failed, without the traceback that DCP adds."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error) or type(error).__name__).splitlines()[0]


def _make_room(run_dir: Path, partial: Path, adapter: Adapter) -> None:
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        need, free = size(adapter), free_space(run_dir)
        if need > free:
            raise OSError(f"it needs about {units.size(need)} and {units.size(free)} are free")


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        return
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.api.CheckpointException as error:  # a BaseException
        raise RuntimeError(_first_line(error)) from error


def _write_state(partial: Path, state: dict) -> None:
    if distributed.rank() == 0:
        (partial / "state.json").write_text(json.dumps(state, indent=1))


def _checksums(partial: Path) -> dict[str, dict]:
    """Sync this rank's share of the files to the disk and compute their checksums."""
    own = manifest.files(partial)[distributed.rank() :: distributed.world_size()]
    for name in own:
        folders.sync_to_disk(partial / name)
    return manifest.entries(partial, own)


def _publish(partial: Path, final: Path, listed: list[dict[str, dict]]) -> None:
    """Mark a checkpoint as complete and rename it. A crash leaves it under one name or the other, never in between."""
    if distributed.rank() == 0:
        entries = {name: entry for part in listed for name, entry in part.items()}
        (partial / MARKER).write_text(json.dumps(entries, indent=1))
        folders.sync_to_disk(partial / MARKER)
        for folder in (*(path for path in partial.iterdir() if path.is_dir()), partial):
            folders.sync_to_disk(folder)
        if final.exists():
            _remove(final)
        partial.rename(final)
        folders.sync_to_disk(final.parent)
        folders.sync_to_disk(final.parent.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that, whenever it is stopped, what is left does not count as one."""
    trash = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _rename_as_damaged(folder: Path) -> None:
    if distributed.rank() == 0:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.error("%s is now %s; remove it when nobody needs it", folder, aside)
    distributed.barrier()
