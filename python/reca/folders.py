"""Folders that a command is going to write to, tried before the work begins, and files replaced as a whole."""

import os
import tempfile
from pathlib import Path


def writable(folder: Path, what: str) -> Path:
    """Make the folder if need be. Raises ValueError when nothing can be written to it. what: names it in the error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{what} {folder} cannot be written to ({error.strerror}); name another folder") from error
    return folder


PART = ".part"  # of a file that is being written; a killed process leaves it


def replace_text(path: Path, text: str) -> None:
    """Write a file so that, whatever happens, it has the old text or the new one, on the disk too."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
