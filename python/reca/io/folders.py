"""Output folders, checked before the work begins, and atomic replacement of files."""

import errno
import os
import re
import stat
import tempfile
import uuid
from pathlib import Path

from reca import exits

PART = ".part"  # suffix of a file that is being written; a killed process leaves it behind
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # first part of a path that was made of an address

# Kinds of folders that a command fills, and the groups of files by each of which such a folder is known.
RUN, EVALUATION, COMPARISON, BEST_OF = "a run", "an evaluation", "a comparison", "images that best-of kept"
MARKS = {
    RUN: (("recipe.yaml", "status.json"),),
    EVALUATION: (("generation.json",), ("records.jsonl",), ("results.json", "report.txt")),
    COMPARISON: (("comparison.json", "comparison.html"),),
    BEST_OF: (("best_of.json",),),
}
CHECKPOINTS = "checkpoints"
INSIDE = {CHECKPOINTS: RUN, "images": EVALUATION}  # subfolders whose contents are of their folder's command alone
NO_FSYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}  # errors of file systems without fsync of folders


class NotWritable(ValueError):
    """A folder cannot be written to; the message names it."""

    exit_code = exits.DATA


def ensure_writable(folder: Path, name: str, kind: str | None = None) -> Path:
    """Create the folder if needed, and check that it is writable. name: what the folder is, for messages.

    kind: one of MARKS, or CHECKPOINTS, if the caller fills such a folder.
    Raises NotWritable if that fails, if the folder is of another kind, or if the path is not UTF-8 or is an address
    such as s3://bucket/folder.
    """
    scheme, *rest = folder.parts or ("",)
    if SCHEME.fullmatch(scheme):
        address = f"{scheme}//{'/'.join(rest)}"
        raise NotWritable(f"{name} {address} is an address; name a local folder, and copy it afterwards")
    if not is_utf8(folder):
        raise NotWritable(f"{name} {folder} is not UTF-8, as safetensors requires of paths; name another folder")
    if owner := _owner(folder, kind):
        raise NotWritable(f"{name} {folder} {owner}, with whose files others would mix; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        there = "a broken link" if folder.is_symlink() else "not a folder"
        raise NotWritable(f"{name} {folder} is {there}; name another folder") from error
    except OSError as error:
        raise NotWritable(f"{name} {folder} cannot be written to ({error.strerror}); name another folder") from error
    return folder


def _owner(folder: Path, kind: str | None) -> str | None:
    """Say to what a folder belongs that is not to be filled with files of `kind`; None if it may be."""
    for path in (Path(os.path.abspath(folder)), Path(os.path.realpath(folder))):
        found = next((name for name in MARKS if _is_kind(path, name)), None)
        if found not in (None, kind):
            return f"is the folder of {found}"
        for inner in (path, *path.parents) if kind != CHECKPOINTS else ():
            owner = INSIDE.get(inner.name)
            if owner and _is_kind(inner.parent, owner):
                return f"belongs to the {inner.name} of {owner}, {inner.parent}"
    return None


def run_of(path: Path) -> Path | None:
    """Return the run whose folder a path is, or in whose checkpoints it lies; None if there is none."""
    path = Path(os.path.abspath(path))
    runs = [path, *(inner.parent for inner in (path, *path.parents) if inner.name == CHECKPOINTS)]
    return next((run for run in runs if _is_kind(run, RUN)), None)


def _is_kind(folder: Path, kind: str) -> bool:
    return any(all(os.path.isfile(folder / name) for name in group) for group in MARKS[kind])


def is_utf8(path: Path) -> bool:
    """Tell whether a path is valid UTF-8. Safetensors reads no other."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def make_inside(root: Path, folder: Path) -> None:
    """Create a folder and its parents below `root`.

    `root` itself must exist. A run folder that was moved or removed during the run is thus not created again.
    """
    if folder != root:
        make_inside(root, folder.parent)
        folder.mkdir(exist_ok=True)


def write_atomically(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Write a file so that it has the old or the new content at any time, even if the process is killed.

    sync: the same holds for a crash of the machine, because the content is on disk before the file has its name.
    Raises OSError that names the file; the original error of a full disk does not.
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
    """Flush a file or folder to disk (fsync). A folder is not flushed on a file system that cannot do so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC or not stat.S_ISDIR(os.fstat(handle).st_mode):
            raise
    finally:
        os.close(handle)
