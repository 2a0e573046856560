"""Manifests: a folder's files with sizes and checksums. Written last, it marks the folder as complete."""

import json
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reca.files import sha256

THREADS = 8  # hashlib releases the interpreter lock


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Take size and SHA-256 of these files of `folder`, by name."""
    with ThreadPoolExecutor(THREADS) as pool:
        names = list(names)
        return dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))


def files(folder: Path) -> list[str]:
    """Name all files below `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(path: Path) -> dict[str, dict]:
    """Read the entries of a manifest. Raises ValueError when it is not one, OSError when it is not readable."""
    listed = json.loads(path.read_bytes())
    if not isinstance(listed, dict) or not all(_is_entry(entry) for entry in listed.values()):
        raise ValueError(f"{path} is no list of files")
    return listed


def damage(folder: Path, listed: dict[str, dict], contents: bool = True) -> list[str]:
    """List the differences between the files and the manifest; empty when there are none.

    Sizes are compared first: a file of another size is not read, and without `contents` none is.
    Raises OSError when a file that is there cannot be read: that tells nothing of what it holds.
    """
    faults, same_size = [], []
    for name, entry in listed.items():
        have = _size(folder / name)
        if have is None:
            faults.append(f"{name} is missing")
        elif have != entry["bytes"]:
            faults.append(f"{name} has {have} of {entry['bytes']} bytes")
        elif contents:
            same_size.append(name)
    now = entries(folder, same_size)
    return [
        *faults,
        *(f"{name} has other contents than were written" for name in same_size if now[name] != listed[name]),
    ]


def _size(path: Path) -> int | None:
    """Return the size of a file; None where there is none of this name."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _is_entry(entry) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
