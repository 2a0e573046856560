"""Indexes of large data files, kept in a cache folder and shared by all ranks and all runs.

An index is used while the file it was made of has the same path, size and times. It is written to another name and
renamed, so it is there as a whole or not at all, and one process of a machine makes it while the others wait.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reca.data.remote import AnyPath, RemotePath
from reca.data.skipped import log_once

LARGE = 2**24  # bytes of a file from which on an index is kept
SETTLED = 2.0  # seconds to wait: a file that has just changed may change again under the same time stamp
VERSION = 3  # of all formats; raise it when what is in an index changes


def cache_folder() -> Path:
    """Return the folder of indexes: below RECA_CACHE, or below the user's cache folder."""
    root = os.environ.get("RECA_CACHE")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "reca")
    return Path(root) / "index"


class IndexFile:
    """Where the index of a file is, and whether it is still one of that file.

    depends: what else the index depends on, JSON-able.
    """

    def __init__(self, source: AnyPath, kind: str, *depends: Any):
        self.source, self.depends = source, [VERSION, kind, *depends]
        name = hashlib.sha256(json.dumps([_address(source), *self.depends]).encode("utf-8", "replace"))
        self.path = cache_folder() / f"{name.hexdigest()[:32]}.{kind}"
        self.stamp = self.now()
        age = time.time() - max(self.stamp[2], self.stamp[3]) / 1e9
        if 0 <= age < SETTLED:
            time.sleep(SETTLED - age)
            self.stamp = self.now()

    def now(self) -> list:
        """Return what must not have changed: path, size and times of the file, and what else the index depends on."""
        if isinstance(self.source, RemotePath):
            return [str(self.source), 0, 0, 0, *(self.source.version() or []), *self.depends]
        found = os.stat(self.source)
        path = os.path.abspath(self.source).encode("utf-8", "surrogateescape").hex()
        return [path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, *self.depends]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the right to make this index; other processes wait. Where that fails, several may make the same one."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(f"{self.path}.lock", "a"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def part(self) -> Path:
        """Return a name of its own to write the index to."""
        return self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.part")

    def keep(self, part: Path) -> bool:
        """Put a written index in place, unless the file has changed meanwhile."""
        if self.now() != self.stamp:
            part.unlink(missing_ok=True)
            return False
        part.replace(self.path)
        return True

    def cannot_keep(self, error: OSError) -> None:
        """Say that an index is made anew at every start."""
        log_once(
            logging.WARNING,
            f"the index of {self.source} cannot be kept in {self.path.parent} ({error.strerror or error}): it is made "
            "anew by every process. Set RECA_CACHE to a folder that can be written to",
        )


def _address(source: AnyPath) -> str:
    return str(source) if isinstance(source, RemotePath) else os.path.abspath(source)


def read_json(index: IndexFile) -> Any:
    """Return the content of a JSON index; None when there is none, it is stale, or it is damaged."""
    try:
        digest, _, body = index.path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        content = json.loads(body)
        return content["content"] if content["stamp"] == index.stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(index: IndexFile, content: Any) -> None:
    """Keep a JSON index. Where it cannot be written, a warning says so."""
    body = json.dumps({"stamp": index.stamp, "content": content}).encode()
    part = index.part()
    try:
        part.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        index.keep(part)
    except OSError as error:
        index.cannot_keep(error)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
