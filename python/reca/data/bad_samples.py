"""List of unreadable samples, shared by all ranks and all starts of a run."""

import contextlib
import fcntl
import json
import logging
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reca.data.errors import DataError
from reca.data.read_ahead import read_many
from reca.data.sample import Source
from reca.data.text import one_line
from reca.io.files import parse_json
from reca.io.paths import exists

log = logging.getLogger("reca")


class BadSamples:
    """Counts bad samples, writes each once to a JSONL file, and stops the run if there are too many.

    All ranks write to one file, under a lock, and read the lines of the others; a resumed run reads them as well.
    A line counts as long as the sample has the recorded size: files that were repaired, replaced or removed are tried
    again. A sample that becomes readable (its disk was unmounted) no longer counts: a line has null as reason.
    """

    def __init__(self, path: Path | None, source: Source, max_fraction: float):
        self.path, self.source, self.max_fraction = path, source, max_fraction
        self.bad: dict[str, str] = {}
        self.lock = threading.Lock()
        self.images = 0  # distinct samples of the source, counted when first needed
        self.place = 0  # bytes of the file that this process has read
        self.count()

    def count(self) -> int:
        """Return the number of distinct bad samples of all ranks and starts."""
        if self.path and exists(self.path):
            with self.lock, contextlib.suppress(OSError), self.path.open("rb") as file:
                self._absorb(file)
        return len(self.bad)

    def add(self, index: int, reason: str) -> None:
        """Add a sample. Raises DataError if the fraction of bad samples exceeds the limit."""
        key = self.source.key(index)
        with self.lock:
            if key not in self.bad:
                self._write({"key": key, "sample": index, "bytes": self.source.size(index), "reason": reason})
            if not self.bad:
                text = one_line(f"{key} is skipped: {reason}")
                log.warning("%s. Further bad samples are only counted and listed", text)
            self.bad[key] = reason
            # Many rows may share an image. Each key counts once in the total, as it does among the bad.
            size = self.images = self.images or getattr(self.source, "images", 0) or _count_keys(self.source)
            if len(self.bad) / size > self.max_fraction:
                first = "; ".join(one_line(f"{key} ({reason})") for key, reason in list(self.bad.items())[:3])
                raise DataError(
                    f"{len(self.bad)} of {size} samples are unreadable, more than data.max_bad_fraction="
                    f"{self.max_fraction}: {first}. All are listed in {self.path or 'the log'}. Raise "
                    "data.max_bad_fraction to continue without them, or repair or remove them and start a new run: a "
                    "run resumes only with the same data"
                )

    def mark_good(self, index: int) -> None:
        """Remove a sample that could be read this time, for all ranks and starts."""
        if self.bad and (key := self.source.key(index)) in self.bad:
            with self.lock:
                self._write({"key": key, "sample": index, "bytes": self.source.size(index), "reason": None})
                self.bad.pop(key, None)

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line, unless another rank has done so."""
        if self.path is None:
            return
        try:
            with self.path.open("a+b") as file:
                with contextlib.suppress(OSError):  # without locks, a line may be written twice
                    fcntl.flock(file, fcntl.LOCK_EX)
                torn = self._absorb(file)
                if entry["key"] not in self.bad or entry["reason"] is None:
                    line = json.dumps(entry).encode() + b"\n"
                    file.write(b"\n" * torn + line)
                    file.flush()
                    self.place = file.tell()
        except OSError as error:
            log.warning("%s cannot be written (%s): %s", self.path, error.strerror, json.dumps(entry))

    def _absorb(self, file: BinaryIO) -> bool:
        """Read the lines that others have appended. Return whether the last one is incomplete, as after a kill."""
        file.seek(self.place)
        new = file.read()
        whole, _, tail = new.rpartition(b"\n")
        listed = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = parse_json(line)
                key, index, size, reason = (entry[name] for name in ("key", "sample", "bytes", "reason"))
                if 0 <= index < len(self.source) and self.source.key(index) == key:
                    listed.append((key, index, size, reason))
        sizes = read_many(self.source.size, [index for _, index, _, _ in listed])
        for (key, _, size, reason), now in zip(listed, sizes, strict=True):
            if now == size and reason is not None:
                self.bad.setdefault(key, reason)
            else:
                self.bad.pop(key, None)
        self.place += len(new) - len(tail)
        return bool(tail)


def _count_keys(source: Source) -> int:
    """Return the number of distinct keys of a source, by 8-byte hashes."""
    keys = (hash(source.key(index)) for index in range(len(source)))
    return np.unique(np.fromiter(keys, np.int64, len(source))).size
