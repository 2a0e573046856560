"""The published files that a model is loaded from, identified by content."""

import hashlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from reca.config.recipe import Recipe
from reca.io.paths import is_dir, is_file

PIECES, PIECE = 16, 1 << 16  # number and bytes of the excerpts that identify a weight file


def published_files(recipe: Recipe) -> dict[str, str]:
    """Return the files, folders and hub ids that a model is loaded from, by key."""
    values = {f.name: getattr(recipe.model, f.name) for f in fields(recipe.model) if f.metadata.get("path")}
    return {name: value for name, value in values.items() if value is not None}


def published_model(recipe: Recipe) -> dict[str, Any]:
    """Identify a model without checkpoint: its type and settings, with fingerprints of its files in place of paths."""
    files = {name: file_fingerprint(value) for name, value in published_files(recipe).items()}
    return {"umm": recipe.umm} | asdict(recipe)["model"] | files


def file_fingerprint(source: str) -> str:
    """Hash excerpts of a file, or of all files in a folder. Return a hub id unchanged."""
    path = Path(source)
    if is_file(path):
        return digest(_excerpt(path))
    if is_dir(path):
        inside = sorted(p for p in path.rglob("*") if is_file(p) and not p.relative_to(path).as_posix().startswith("."))
        return digest(b"".join(b"%r %s" % (p.relative_to(path).as_posix(), _excerpt(p)) for p in inside))
    return source


def _excerpt(path: Path) -> bytes:
    """Return the size and evenly spaced excerpts of a file, including its first and last bytes."""
    size = path.stat().st_size
    pieces = [b"%d" % size]
    with path.open("rb") as file:
        for i in range(PIECES):
            file.seek(max(0, size - PIECE) * i // (PIECES - 1))
            pieces.append(file.read(PIECE))
    return b"".join(pieces)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
