"""Indexes of large data files, stored in a cache folder and shared by all ranks and runs.

An index is valid as long as its data files have the same paths, sizes and times. It is written under a temporary name
and renamed, so it is either complete or absent. One process per machine builds it while the others wait.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.data.read_ahead import read_ahead
from reca.data.sources.patterns import some
from reca.data.sources.remote import REQUESTS, AnyPath, RemotePath
from reca.data.sources.skipped import log_once
from reca.io.files import parse_json

LARGE = 2**24  # bytes; files of at least this size, together, get an index file
SETTLED = 2.0  # seconds; a file that changed more recently could change again with the same time stamp
VERSION = 6  # of all index formats; increment when the content of an index changes


def cache_folder() -> Path:
    """Return the folder of index files: below RECA_CACHE or the user's cache folder."""
    root = os.environ.get("RECA_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "reca")
    return Path(os.path.expanduser(root)) / "index"


class Stamp(NamedTuple):
    """State of a file. version: of a remote file, None if the server reports none."""

    path: str
    size: int
    modified: int = 0  # nanoseconds, as `changed`; 0 for a remote file
    changed: int = 0
    version: list[str] | None = None


class IndexFile:
    """Path of the index of files, and the stamp by which it is valid. Each file is asked about once.

    depends: everything else that the index depends on, JSON-serialisable.
    Raises OSError if a file cannot be asked about.
    """

    def __init__(self, sources: Sequence[AnyPath], kind: str, *depends: Any):
        self.sources, self.depends, self.name = sources, [VERSION, kind, *depends], some(sources)
        name = hashlib.sha256(json.dumps([*map(_address, sources), *self.depends]).encode("utf-8", "replace"))
        self.path = cache_folder() / f"{name.hexdigest()[:32]}.{kind}"
        self.files = list(read_ahead(_stamp, sources, REQUESTS))

    @property
    def is_safe(self) -> bool:
        """Tell whether a change of the files would be noticed: servers identify versions of remote ones."""
        remote = (isinstance(source, RemotePath) for source in self.sources)
        return all(file.version or not far for file, far in zip(self.files, remote, strict=True))

    @property
    def is_large(self) -> bool:
        """Tell whether reading the files takes so long that their index is worth a file."""
        return sum(file.size for file in self.files) >= LARGE

    @functools.cached_property
    def stamp(self) -> list:
        """Stamp of the files and everything else the index depends on. Waits until they have settled."""
        age = time.time() - max(max(file.modified, file.changed) for file in self.files) / 1e9
        if 0 <= age < SETTLED:
            time.sleep(SETTLED - age)
            return self.now()
        return [list(map(list, self.files)), *self.depends]

    def now(self) -> list:
        """Return the current stamp. Servers are asked again."""
        files = (file.again() if isinstance(file, RemotePath) else file for file in self.sources)
        return [list(map(list, read_ahead(_stamp, files, REQUESTS))), *self.depends]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock for building this index. Without a lock, as on some file systems, several processes may."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(f"{self.path}.lock", "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def part(self) -> Path:
        """Return a unique temporary path to write the index to."""
        return self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")

    def keep(self, part: Path) -> None:
        """Move a written index into place. Delete it if the data file has changed meanwhile."""
        if self.now() == self.stamp:
            part.replace(self.path)
        else:
            part.unlink(missing_ok=True)

    def cannot_keep(self, error: OSError) -> None:
        """Warn that the index has to be rebuilt at every start."""
        log_once(
            logging.WARNING,
            f"the index of {self.name} cannot be saved in {self.path.parent} ({error.strerror or error}): every "
            "process rebuilds it. Set RECA_CACHE to a writable folder",
        )


def _stamp(source: AnyPath) -> Stamp:
    if isinstance(source, RemotePath):
        size, version = source.version()
        return Stamp(str(source), size, version=version)
    found = os.stat(source)
    path = os.path.abspath(source).encode("utf-8", "surrogateescape").hex()
    return Stamp(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _address(source: AnyPath) -> str:
    return str(source) if isinstance(source, RemotePath) else os.path.abspath(source)


def read_json(index: IndexFile) -> Any:
    """Return the content of a JSON index; None if it is missing, stale or damaged."""
    try:
        digest, _, body = index.path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        content = parse_json(body)
        return content["content"] if content["stamp"] == index.stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(index: IndexFile, content: Any) -> None:
    """Save a JSON index. Log a warning if that fails."""
    body = json.dumps({"stamp": index.stamp, "content": content}).encode()
    part = index.part()
    try:
        part.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        index.keep(part)
    except OSError as error:
        index.cannot_keep(error)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
