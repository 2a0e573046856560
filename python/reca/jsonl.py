"""JSON lines that a run leaves behind; a full disk loses lines and never the run."""

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
    """Appends to a file, every line at once. What cannot be written is counted, and said when it happens first."""

    def __init__(self, path: Path):
        self.path, self.lost, self.torn = path, 0, False
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, value: dict[str, Any]) -> None:
        line = b"\n" * self.torn + json.dumps(value).encode() + b"\n"
        try:
            written = os.write(self.handle, line)
            self.torn = written < len(line)
            if not self.torn:
                return
            reason = "the disk is full"
        except OSError as error:
            reason = error.strerror
        self.lost += 1
        if self.lost == 1:
            log.warning("%s cannot be written (%s): lines are lost from here on", self.path, reason)

    def close(self) -> None:
        os.close(self.handle)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file; torn ones, and a file that is not there, are nothing."""
    return [value for _, value in _lines(path)]


def truncate_after(path: Path, step: int) -> None:
    """Keep only what a run that goes on from `step` will not write again: whole lines of steps until then."""
    lines = _lines(path)
    kept = b"".join(line + b"\n" for line, value in lines if _update(value) <= step)
    if path.is_file() and kept != path.read_bytes():
        write_atomically(path, kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Read the lines that are JSON objects, each as it stands there and as what it means."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append((line, value))
    return found


def _update(value: dict[str, Any]) -> float:
    step = value.get("step", 0)
    return step if isinstance(step, int | float) else math.inf
