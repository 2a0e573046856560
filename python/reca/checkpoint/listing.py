"""Find the checkpoints of a run that are sound, and remove or rename others."""

import logging
import os
import shutil
from pathlib import Path

from reca import distributed
from reca.checkpoint import manifest
from reca.checkpoint.errors import CheckpointError
from reca.io.checkpoints import MARKER, list_complete

log = logging.getLogger("reca")

PARTIAL = ".partial"  # suffix while a checkpoint is written or removed; the next start removes leftovers


def latest_valid(run_dir: Path) -> Path | None:
    """Find the latest checkpoint whose files match their checksums; None if the run has no checkpoint.

    Damaged ones are logged as errors and skipped. The result is the same on every rank.
    Raises CheckpointError if all of them are damaged; the message says what to remove.
    """
    faults: dict[Path, str] = {}
    while True:
        # Rank 0's list: on a network file system, the others may see a folder later.
        with distributed.fail_together():
            own = list_complete(run_dir)
        there = distributed.all_gather(own)[0]
        faults = {folder: fault for folder, fault in faults.items() if folder in there}  # a live run removes old ones
        if not (left := [folder for folder in there if folder not in faults]):
            break
        if fault := find_damage(left[-1]):
            faults[left[-1]] = fault
            continue
        for damaged, reason in faults.items():
            log.error("checkpoint %s is DAMAGED (%s); going back to %s", damaged, reason, left[-1])
        return left[-1]
    if not faults:
        return None
    reasons = "; ".join(f"{folder}: {reason}" for folder, reason in faults.items())
    raise CheckpointError(
        f"no checkpoint of {run_dir} is sound ({reasons}). Restore the files, or remove "
        f"{', '.join(map(str, faults))} and {run_dir / 'status.json'} to start this run again from its first step"
    )


def find_damage(folder: Path, contents: bool = True) -> str:
    """Describe the damage to a complete checkpoint; empty if there is none.

    contents: also read the files of tensors. The ranks share that work, so all of them must call it then.
    Raises OSError if an existing file cannot be read, PeerFailed if that happens on another rank: no proof of damage.
    """
    if not contents:
        return "; ".join(compare(folder, contents=False))
    with distributed.fail_together():
        faults = compare(folder, distributed.rank(), distributed.world_size())
    return "; ".join(dict.fromkeys(fault for part in distributed.all_gather(faults) for fault in part))


def compare(folder: Path, part: int = 0, parts: int = 1, *, contents: bool = True) -> list[str]:
    """List the differences between a checkpoint's files, or part `part` of `parts` of them, and their checksums.

    Ranks need not call it together. Raises OSError if an existing file cannot be read.
    """
    try:
        listed = manifest.read(folder / MARKER)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return [f"{MARKER} cannot be read: {error}"]
    return manifest.damage(folder, dict(list(listed.items())[part::parts]), contents)


def remove_partial(run_dir: Path) -> None:
    """Remove partial checkpoints of killed processes. Only the process that holds the run's lock may call it."""
    for folder in (run_dir / "checkpoints").glob(f"*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint. If the removal is interrupted, the rest does not count as a checkpoint.

    Of one that was moved to another disk and linked, only the link is removed.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    trash = folder.with_name(f"{folder.name}.old{PARTIAL}")
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def rename_damaged(run_dir: Path, valid: Path | None) -> None:
    """Rename checkpoints that `latest_valid` has skipped to NUMBER.damaged, as the resumed run writes them again.

    If NUMBER.damaged exists, the name is NUMBER.damaged.2, and so on. Only the process that holds the run's lock may
    call it. valid: result of `latest_valid`.
    """
    for folder in list_complete(run_dir):
        if valid is not None and int(folder.name) > int(valid.name):
            aside = first = folder.with_name(f"{folder.name}.damaged")
            number = 1
            while os.path.lexists(aside):
                number += 1
                aside = first.with_name(f"{first.name}.{number}")
            folder.rename(aside)
            log.error("damaged checkpoint %s was renamed to %s; remove it when it is no longer needed", folder, aside)


def free_space(run_dir: Path) -> int:
    """Return the free bytes on the disk of a run's checkpoints, whose folder may be a link to another disk."""
    return shutil.disk_usage(run_dir / "checkpoints").free
