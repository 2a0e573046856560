"""JSON lines files of a run. A full disk loses lines, and never ends the run."""

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from reca.folders import write_atomically

log = logging.getLogger("reca")


class JsonLines:
    """Appends to a file, every line at once. Lines that cannot be written are counted; the first is logged.

    A line that was left incomplete, here or before, is ended first.
    """

    def __init__(self, path: Path):
        self.path, self.lost = path, 0
        self.handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self.handle).st_size
        self.torn = size > 0 and os.pread(self.handle, 1, size - 1) != b"\n"

    def write(self, value: dict[str, Any]) -> None:
        line = b"\n" * self.torn + json.dumps(value).encode() + b"\n"
        try:
            written = os.write(self.handle, line)
            self.torn = written < len(line)
            if not self.torn:
                return
            reason = "the disk is full"
        except OSError as error:
            reason = error.strerror or str(error)
        self.lost += 1
        if self.lost == 1:
            log.warning("%s cannot be written (%s): lines are lost from here on", self.path, reason)

    def close(self) -> None:
        os.close(self.handle)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a file. Incomplete lines and a missing file are skipped."""
    return [value for _, value in _lines(path)]


def truncate_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, which a run continued from there writes again, and incomplete lines."""
    lines = _lines(path)
    kept = b"".join(line + b"\n" for line, value in lines if _step_of(value) <= step)
    if path.is_file() and kept != path.read_bytes():
        write_atomically(path, kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """List the lines that are JSON objects, each as bytes and as its value."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append((line, value))
    return found


def _step_of(value: dict[str, Any]) -> float:
    step = value.get("step", 0)
    return step if isinstance(step, int | float) else math.inf
