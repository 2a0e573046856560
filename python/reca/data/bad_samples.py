"""The list of samples that could not be read, shared by all ranks and all starts of a run."""

import contextlib
import fcntl
import json
import logging
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reca.data.errors import DataError
from reca.data.sample import Source

log = logging.getLogger("reca")


class BadSamples:
    """Counts bad samples, writes each once to a JSONL file, and stops the run when there are too many.

    All ranks write to one file, under a lock, and read what the others have added; so does the next start of the run.
    A line counts while the sample has the recorded size: a file that was repaired, replaced or removed is tried again,
    and one that can be read after all (its disk was unmounted) counts no longer.
    """

    def __init__(self, path: Path | None, source: Source, max_fraction: float):
        self.path, self.source, self.max_fraction = path, source, max_fraction
        self.bad: dict[str, str] = {}
        self.lock = threading.Lock()
        self.images = 0  # distinct samples of the source, once they are needed
        self.place = 0  # bytes of the file that are known here
        self.count()

    def count(self) -> int:
        """Count the distinct bad samples, of all ranks and starts."""
        if self.path and self.path.exists():
            with self.lock, contextlib.suppress(OSError), self.path.open("rb") as file:
                self._absorb(file)
        return len(self.bad)

    def add(self, index: int, reason: str) -> None:
        """Add a sample. Raises DataError when more than the allowed share of all samples is bad."""
        key = self.source.key(index)
        with self.lock:
            if key not in self.bad:
                self._write({"key": key, "sample": index, "bytes": self.source.size(index), "reason": reason})
            if not self.bad:
                log.warning("%s is left out: %s. Further ones are only counted and listed", key, reason)
            self.bad[key] = reason
            # Many rows may ask about one image. They are counted as the bad ones are: once.
            size = self.images = self.images or getattr(self.source, "images", 0) or _count_keys(self.source)
            if len(self.bad) / size > self.max_fraction:
                first = "; ".join(f"{key} ({reason})" for key, reason in list(self.bad.items())[:3])
                raise DataError(
                    f"{len(self.bad)} of {size} samples are unreadable, more than data.max_bad_fraction="
                    f"{self.max_fraction}: {first}. All are in {self.path or 'the log'}. Raise "
                    "data.max_bad_fraction to go on without them, or repair or remove them and begin a new run: one "
                    "that has begun goes on with the same data only"
                )

    def mark_good(self, index: int) -> None:
        """Remove a sample that an earlier start could not read."""
        if self.bad:
            self.bad.pop(self.source.key(index), None)

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line, unless another rank has done so."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                with contextlib.suppress(OSError):  # some file systems have no locks: then a line may come twice
                    fcntl.flock(file, fcntl.LOCK_EX)
                torn = self._absorb(file)
                if entry["key"] not in self.bad:
                    line = json.dumps(entry).encode() + b"\n"
                    file.write(b"\n" * torn + line)
                    file.flush()
                    self.place = file.tell()
        except OSError as error:
            log.warning("%s cannot be written (%s): %s", self.path, error.strerror, json.dumps(entry))

    def _absorb(self, file: BinaryIO) -> bool:
        """Read what others have appended. Returns whether the last line is incomplete, as kills leave it."""
        file.seek(self.place)
        new = file.read()
        whole, _, tail = new.rpartition(b"\n")
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                key, index = entry["key"], entry["sample"]
                if 0 <= index < len(self.source) and self.source.key(index) == key:
                    if self.source.size(index) == entry["bytes"]:
                        self.bad.setdefault(key, entry["reason"])
                    else:
                        self.bad.pop(key, None)
        self.place += len(new) - len(tail)
        return bool(tail)


def _count_keys(source: Source) -> int:
    """Count the distinct keys of a source, by a hash of 8 bytes each."""
    keys = (hash(source.key(index)) for index in range(len(source)))
    return np.unique(np.fromiter(keys, np.int64, len(source))).size
