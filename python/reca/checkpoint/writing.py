"""Write checkpoints to a partial folder, with checksums, and rename it when complete.

All ranks write together. Their collectives use a separate gloo group, so that a thread can write during training: two
threads that use the same group can deadlock.
"""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from reca import distributed, exits, units
from reca.checkpoint import manifest
from reca.checkpoint.contents import Snapshot, snapshot
from reca.checkpoint.errors import first_failure, first_reason
from reca.checkpoint.listing import PARTIAL, free_space, remove
from reca.checkpoint.retention import Keep
from reca.io import folders
from reca.io.checkpoints import MARKER, list_complete
from reca.io.paths import exists, is_dir
from reca.models.base import Adapter

log = logging.getLogger("reca")
# A single process without a process group is normal.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save(run_dir: Path, state: dict, adapter: Adapter, optimizer: torch.optim.Optimizer, keep: Keep) -> Path | None:
    """Write a checkpoint and return its folder; None, with an error in the log, if it could not be written.

    The folder run_dir/checkpoints is created if needed.
    state: JSON-serialisable, with the number of completed steps as "step".
    """
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    return write(run_dir, snapshot(state, adapter, optimizer), keep)


def write(run_dir: Path, taken: Snapshot, keep: Keep, is_lost: Callable[[], bool] = lambda: False) -> Path | None:
    """Write a snapshot as a checkpoint and return its folder; None, with an error in the log, if that failed.

    Older checkpoints are removed only after it is complete.
    is_lost: tells whether `run_dir` is no longer the folder of this run; nothing is written then.
    """
    step, group = taken.state["step"], distributed.gloo_group()
    final = run_dir / "checkpoints" / f"{step:06d}"
    partial = final.with_name(final.name + PARTIAL)
    try:
        with distributed.fail_together(group):
            if is_lost():
                raise OSError(f"{run_dir} is lost")
            _make_room(run_dir, partial, taken.bytes)
        for name, part in taken.parts.items():
            with distributed.fail_together(group):
                _write(partial / name, part, taken.files[name])
        with distributed.fail_together(group):
            _write_state(partial, taken.state)
        with distributed.fail_together(group):
            own = _checksums(partial)
        listed = distributed.all_gather(own, group)
        with distributed.fail_together(group):
            _publish(partial, final, listed)
    except Exception as error:
        reason = f"{getattr(error, 'reason', None) or first_reason(error)}. Earlier checkpoints are untouched"
        if is_lost() or not is_dir(final.parent):
            reason = f"the run folder {run_dir} was moved or removed"
        elif exits.code_of(error) == exits.DATA:
            reason += f"; free space in {run_dir}, or make it writable"
        bug = not isinstance(error, OSError | RuntimeError)
        log.error("checkpoint at step %d NOT saved: %s", step, reason, exc_info=error if bug else None)
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return None
    if distributed.rank() == 0:
        _remove_superseded(run_dir, keep)
    return final


def _remove_superseded(run_dir: Path, keep: Keep) -> None:
    """Remove old checkpoints. One that cannot be removed is logged: the new one is complete."""
    try:
        superseded = keep.superseded(list_complete(run_dir))
    except OSError as error:
        log.warning("old checkpoints of %s cannot be listed (%s), so none is removed", run_dir, error.strerror)
        return
    for old in superseded:
        try:
            remove(old)
        except OSError as error:
            log.warning("old checkpoint %s cannot be removed (%s)", old, error.strerror)


def _make_room(run_dir: Path, partial: Path, need: int) -> None:
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # without parents, as the folders in it: a run folder that was moved is not created again
        free = free_space(run_dir)
        if need > free:
            raise OSError(f"it needs about {units.size(need)} and {units.size(free)} are free")


class _WithoutParents(FileSystem):
    """The file system, on which a writer does not create the parents of its folder."""

    def mkdir(self, path: str | os.PathLike) -> None:
        Path(path).mkdir(exist_ok=True)


def _write(folder: Path, part: dict[str, Tensor], files: dict[str, int]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    writer.fs = _WithoutParents()
    try:
        dcp.save(part, storage_writer=writer, process_group=distributed.gloo_group())
    except dcp.api.CheckpointException as error:  # a BaseException
        kind = OSError if isinstance(first_failure(error), OSError) else RuntimeError
        raise kind(first_reason(error)) from error


def _write_state(partial: Path, state: dict) -> None:
    if distributed.rank() == 0:
        (partial / "state.json").write_text(json.dumps(state, indent=1))


def _checksums(partial: Path) -> dict[str, dict]:
    """Flush this rank's share of the files to disk and compute their checksums."""
    own = manifest.files(partial)[distributed.rank() :: distributed.world_size()]
    for name in own:
        folders.sync_to_disk(partial / name)
    return manifest.entries(partial, own)


def _publish(partial: Path, final: Path, listed: list[dict[str, dict]]) -> None:
    """Mark a checkpoint as complete and rename it. After a crash it exists under exactly one of the two names."""
    if distributed.rank() == 0:
        entries = {name: entry for part in listed for name, entry in part.items()}
        (partial / MARKER).write_text(json.dumps(entries, indent=1))
        folders.sync_to_disk(partial / MARKER)
        for folder in (*(path for path in partial.iterdir() if is_dir(path)), partial):
            folders.sync_to_disk(folder)
        if exists(final):
            remove(final)
        partial.rename(final)
        folders.sync_to_disk(final.parent)
        folders.sync_to_disk(final.parent.parent)
