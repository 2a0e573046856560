"""Find the complete checkpoints of a run. Imports no torch, for `reca status`."""

import os
from pathlib import Path

from reca.io.folders import CHECKPOINTS
from reca.io.paths import exists

MARKER = "COMPLETE"


def list_complete(run_dir: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first. Names are steps: digits, compared as numbers.

    Raises OSError if the folder exists and cannot be read, so that the run does not start from the first step again.
    """
    try:
        names = os.listdir(run_dir / CHECKPOINTS)  # Path.glob returns nothing for an unreadable folder
    except (FileNotFoundError, NotADirectoryError):
        return []
    folders = [run_dir / CHECKPOINTS / name for name in sorted(filter(str.isdecimal, names), key=int)]
    return [folder for folder in folders if exists(folder / MARKER)]


def latest(run_dir: Path) -> Path | None:
    """Find the latest complete checkpoint of a run, damaged or not."""
    return next(reversed(list_complete(run_dir)), None)
