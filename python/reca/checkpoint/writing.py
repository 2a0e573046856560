"""Write checkpoints: aside, with checksums, and renamed when complete."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from reca import distributed, folders, manifest, units
from reca.checkpoint.contents import EMA, FLAT, changed_parameters, tensors
from reca.checkpoint.errors import first_line
from reca.checkpoint.listing import MARKER, PARTIAL, free_space, list_complete, remove
from reca.models.base import Adapter

log = logging.getLogger("reca")
# One process without a process group is what a laptop has, and no reason to warn.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save(
    run_dir: Path,
    state: dict,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    keep: int,
    ema: dict[str, Tensor] | None = None,
) -> Path | None:
    """Write a checkpoint and return its folder; None, with an error in the log, if the disk cannot take it.

    Older checkpoints stay until it is complete.

    state: JSON-able, with the number of steps done as "step". ema: averages of the trained parameters.
    """
    final = run_dir / "checkpoints" / f"{state['step']:06d}"
    partial = final.with_name(final.name + PARTIAL)
    moments = get_optimizer_state_dict(adapter, optimizer, options=FLAT)
    state = state | {"group_steps": [group.get("step") for group in optimizer.param_groups]}  # where apex counts
    try:
        with distributed.fail_together():
            _make_room(run_dir, partial, _bytes(changed_parameters(adapter), tensors(moments), ema or {}))
        with distributed.fail_together():
            _write(partial / "weights", changed_parameters(adapter))
        with distributed.fail_together():
            _write(partial / "optimizer", tensors(moments))
        with distributed.fail_together():
            _write(partial / EMA, ema or {})
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
            state["step"], getattr(error, "reason", None) or first_line(error), run_dir,
        )  # fmt: skip
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return None
    if distributed.rank() == 0 and keep:
        for old in list_complete(run_dir)[:-keep]:
            try:
                remove(old)
            except OSError as error:
                log.warning("checkpoint %s cannot be removed (%s); checkpoint.keep=%d", old, error.strerror, keep)
    return final


def _bytes(*contents: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for content in contents for tensor in content.values())


def _make_room(run_dir: Path, partial: Path, need: int) -> None:
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = free_space(run_dir)
        if need > free:
            raise OSError(f"it needs about {units.size(need)} and {units.size(free)} are free")


def _write(folder: Path, part: dict[str, Tensor]) -> None:
    if not part:
        return
    try:
        dcp.save(part, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.api.CheckpointException as error:  # a BaseException
        raise RuntimeError(first_line(error)) from error


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
            remove(final)
        partial.rename(final)
        folders.sync_to_disk(final.parent)
        folders.sync_to_disk(final.parent.parent)
