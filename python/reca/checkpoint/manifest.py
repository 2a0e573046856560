"""Manifests: sizes and checksums of a folder's files. Written last, a manifest marks the folder as complete."""

import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reca.io.files import parse_json, sha256
from reca.io.paths import is_file

THREADS = 8  # hashlib releases the GIL


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Return the size and SHA-256 of files of `folder`, by name."""
    with ThreadPoolExecutor(THREADS) as pool:
        names = list(names)
        return dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))


def files(folder: Path) -> list[str]:
    """List the relative paths of all files below `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_file(path))


def read(path: Path) -> dict[str, dict]:
    """Read the entries of a manifest. Raises ValueError if it is invalid, OSError if it cannot be read."""
    listed = parse_json(path.read_bytes())
    if not isinstance(listed, dict) or not all(_is_entry(entry) for entry in listed.values()):
        raise ValueError(f"{path} is not a manifest")
    return listed


def damage(folder: Path, listed: dict[str, dict], contents: bool = True) -> list[str]:
    """List the differences between the files and the manifest; empty if there are none.

    Files whose size differs are not hashed; with contents=False only the small ones, which are JSON, are.
    Raises OSError if an existing file cannot be read, because that is no evidence of damage.
    """
    faults, same_size = [], []
    for name, entry in listed.items():
        have = _size(folder / name)
        if have is None:
            faults.append(f"{name} is missing")
        elif have != entry["bytes"]:
            faults.append(f"{name} has {have} of {entry['bytes']} bytes")
        elif contents or name.endswith(".json"):
            same_size.append(name)
    now = entries(folder, same_size)
    return [
        *faults,
        *(f"{name} does not match its checksum" for name in same_size if now[name] != listed[name]),
    ]


def _size(path: Path) -> int | None:
    """Return the size of a file; None if it does not exist or is not a regular file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _is_entry(entry) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
