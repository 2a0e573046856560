"""Folders that a command is going to write to, tried before the work begins."""

import tempfile
from pathlib import Path


def writable(folder: Path, what: str) -> Path:
    """The folder, made if need be. Raises ValueError when nothing can be written to it. what: names it in the error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be written to ({error.strerror}); name another folder") from error
    return folder
