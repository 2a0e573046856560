"""Checkpoints of a run: torch.distributed.checkpoint, written aside and renamed when complete.

    run_dir/checkpoints/000500/
        weights/    trained parameters, safetensors, one file a rank, reshardable
        optimizer/  optimizer state, reshardable
        state.json  counters
        COMPLETE    written last

Frozen parameters are not saved: they are those of `model.weights`.
"""

import json
import logging
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from reca import distributed

log = logging.getLogger("reca")
# One process without a process group is what a laptop has, and no reason to warn.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not belong to this run."""


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    done = sorted(marker.parent for marker in (run_dir / "checkpoints").glob("[0-9]*/COMPLETE"))
    return done[-1] if done else None


def save(run_dir: Path, state: dict, adapter: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path | None:
    """Write a checkpoint; None, loudly, if the disk would not take it. Older checkpoints stay until it is complete."""
    final = run_dir / "checkpoints" / f"{state['update']:06d}"
    partial = final.with_name(f"{final.name}.partial")
    failure = _too_full(run_dir, adapter)
    if failure is None:
        try:
            if distributed.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            distributed.barrier()
            writer = HuggingFaceStorageWriter(str(partial / "weights"), save_distributed=True)
            dcp.save(trained(adapter), storage_writer=writer)
            dcp.save(get_optimizer_state_dict(adapter, optimizer), checkpoint_id=str(partial / "optimizer"))
            if distributed.rank() == 0:
                (partial / "state.json").write_text(json.dumps(state, indent=1))
                (partial / "COMPLETE").touch()
                _fsync(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        except (OSError, dcp.api.CheckpointException) as error:
            failure = str(error)
    device = next(adapter.parameters()).device
    if distributed.any_rank(failure is not None, device):
        log.error(
            "checkpoint at update %d NOT saved: %s. Training goes on and earlier checkpoints are untouched; free space "
            "in %s",
            state["update"], failure or "another rank failed", run_dir,
        )  # fmt: skip
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return None
    if distributed.rank() == 0 and keep:
        for old in sorted((run_dir / "checkpoints").glob("[0-9]*/COMPLETE"))[:-keep]:
            shutil.rmtree(old.parent)
    distributed.barrier()
    return final


def load(folder: Path, adapter: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Put a checkpoint's parameters (and optimizer state) in place, at any number of ranks. Returns the counters.

    Raises CheckpointError if the checkpoint is incomplete or holds other parameters than this run trains.
    """
    if not (folder / "COMPLETE").exists():
        raise CheckpointError(f"{folder} is not a complete checkpoint (no COMPLETE file); use an earlier one")
    weights = trained(adapter)
    saved = _saved(folder)
    wanted = {name: tuple(value.shape) for name, value in weights.items()}
    if saved != wanted:
        differ = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{folder} does not fit the parameters this run trains: {len(differ)} differ, the first {differ[:5]}. "
            "Was model or train.train changed? Start in another run_dir, or restore the recipe"
        )
    dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder / "weights")))
    if optimizer is not None:
        state = get_optimizer_state_dict(adapter, optimizer)
        dcp.load(state, checkpoint_id=str(folder / "optimizer"))
        set_optimizer_state_dict(adapter, optimizer, state)
    return json.loads((folder / "state.json").read_text())


def overlay(run_dir: Path, adapter: nn.Module) -> None:
    """Put what another run has trained over the adapter's parameters, whatever this run trains.

    Raises CheckpointError if that run has no complete checkpoint, or parameters that this model has not.
    """
    folder = newest(run_dir)
    if folder is None:
        raise CheckpointError(f"{run_dir} has no complete checkpoint; did the run save one?")
    own = {name: p.detach() for name, p in adapter.named_parameters()}
    saved = _saved(folder)
    misfits = sorted(name for name, shape in saved.items() if name not in own or tuple(own[name].shape) != shape)
    if misfits:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(misfits)} of its parameters are missing here or have another "
            f"shape, the first {misfits[:5]}. Both runs must name the same umm and sizes"
        )
    dcp.load({name: own[name] for name in saved}, storage_reader=HuggingFaceStorageReader(str(folder / "weights")))


def _saved(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's parameters."""
    metadata = HuggingFaceStorageReader(str(folder / "weights")).read_metadata()
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}


def trained(adapter: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name; the tensors themselves, so that loading fills them."""
    return {name: p.detach() for name, p in adapter.named_parameters() if p.requires_grad}


def _too_full(run_dir: Path, adapter: nn.Module) -> str | None:
    run_dir.mkdir(parents=True, exist_ok=True)
    need = 3 * sum(p.numel() * p.element_size() for p in trained(adapter).values())
    free = shutil.disk_usage(run_dir).free
    return f"it needs about {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free" if need > free else None


def _fsync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
