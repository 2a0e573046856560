"""Folders that a command writes to, tried before the work begins, and files that are replaced as a whole."""

import os
import tempfile
import uuid
from pathlib import Path

PART = ".part"  # suffix of a file that is being written; a killed process leaves it


def ensure_writable(folder: Path, name: str) -> Path:
    """Make the folder if need be. name: what it is, for the message.

    Raises ValueError when nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        there = "a link that leads nowhere" if folder.is_symlink() else "no folder"
        raise ValueError(f"{name} {folder} is {there}; name another folder") from error
    except OSError as error:
        raise ValueError(f"{name} {folder} cannot be written to ({error.strerror}); name another folder") from error
    return folder


def write_atomically(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Write a file so that, whatever happens, it has the old content or the new one.

    sync: wait until the new one is on the disk, so that a crash of the machine cannot lose it.
    Raises OSError that names the file: a full disk's own does not.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            sync_to_disk(part)
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def sync_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
