"""Which checkpoints a run has: complete, damaged and partial ones."""

import logging
import os
import shutil
from pathlib import Path

from reca import distributed, manifest
from reca.checkpoint.errors import CheckpointError

log = logging.getLogger("reca")

MARKER = "COMPLETE"
PARTIAL = ".partial"  # being written or removed; the next start removes what a killed process has left


def list_complete(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first. Names are steps: digits, compared as numbers.

    Raises OSError when the folder is there and cannot be read, so that no run begins anew for that.
    """
    try:
        names = os.listdir(run_dir / "checkpoints")  # Path.glob finds nothing in a folder that it may not read
    except (FileNotFoundError, NotADirectoryError):
        return []
    folders = [run_dir / "checkpoints" / name for name in sorted(filter(str.isdecimal, names), key=int)]
    return [folder for folder in folders if (folder / MARKER).exists()]


def latest(run_dir: Path) -> Path | None:
    """Find the latest complete checkpoint of a run, damaged or not."""
    return next(reversed(list_complete(run_dir)), None)


def latest_valid(run_dir: Path) -> Path | None:
    """Find the latest checkpoint whose files match their checksums; None if the run has no checkpoint.

    A damaged one is logged as an error and the one before it is taken. Every rank gets the same answer.
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
    Raises OSError when a file that is there cannot be read, PeerFailed when another rank cannot: no damage is proved.
    """
    if not contents:
        return "; ".join(compare(folder, contents=False))
    with distributed.fail_together():
        faults = compare(folder, distributed.rank(), distributed.world_size())
    return "; ".join(dict.fromkeys(fault for part in distributed.all_gather(faults) for fault in part))


def compare(folder: Path, part: int = 0, parts: int = 1, *, contents: bool = True) -> list[str]:
    """List the differences between a checkpoint's files, or one of so many parts of them, and their checksums.

    Ranks need not call it together. Raises OSError when a file that is there cannot be read.
    """
    try:
        listed = manifest.read(folder / MARKER)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return [f"{MARKER} cannot be read: {error}"]
    return manifest.damage(folder, dict(list(listed.items())[part::parts]), contents)


def remove_partial(run_dir: Path) -> None:
    """Remove partial checkpoints of killed processes. Only for the process that holds the run's lock."""
    for folder in (run_dir / "checkpoints").glob(f"*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that, whenever it is stopped, what is left does not count as one."""
    trash = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def rename_damaged(run_dir: Path, valid: Path | None) -> None:
    """Rename checkpoints that `latest_valid` has passed over to NUMBER.damaged: a run that goes on makes them again.

    Renames nothing over another folder: where there is a NUMBER.damaged, the name is NUMBER.damaged.2, and so on.
    Only for the process that holds the run's lock. valid: what `latest_valid` has found.
    """
    for folder in list_complete(run_dir):
        if valid is not None and int(folder.name) > int(valid.name):
            aside = first = folder.with_name(f"{folder.name}.damaged")
            number = 1
            while os.path.lexists(aside):
                number += 1
                aside = first.with_name(f"{first.name}.{number}")
            folder.rename(aside)
            log.error("%s is now %s; remove it when nobody needs it", folder, aside)


def free_space(run_dir: Path) -> int:
    """Count the bytes free where a run's checkpoints go, which may be linked to another disk."""
    return shutil.disk_usage(run_dir / "checkpoints").free
