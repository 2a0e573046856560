"""JSON Lines files of a run. When the disk is full, lines are lost but the run continues."""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from reca.io.files import parse_json
from reca.io.folders import write_atomically
from reca.io.paths import is_file

log = logging.getLogger("reca")


class JsonLines:
    """Appends lines to a file, each with one unbuffered write. Counts lines that cannot be written; logs the first.

    If the file ends in an incomplete line, a line break is written first.
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
            log.warning("%s cannot be written (%s): further lines may be lost", self.path, reason)

    def close(self) -> None:
        os.close(self.handle)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file that are JSON objects. Incomplete lines are skipped; a missing file has none."""
    return [value for _, value in _lines(path)]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's log, as `read`. Those without a step, which a damaged file can have, are skipped."""
    return [value for value in read(path) if _has_step(value)]


def truncate_after(path: Path, step: int) -> None:
    """Remove damaged lines and those of steps after `step`, which a run resumed at `step` writes again."""
    lines = _lines(path)
    kept = b"".join(line + b"\n" for line, value in lines if _has_step(value) and value["step"] <= step)
    if is_file(path) and kept != path.read_bytes():
        write_atomically(path, kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the raw bytes and the parsed value of every line that is a JSON object."""
    found = []
    for line in path.read_bytes().splitlines() if is_file(path) else ():
        with contextlib.suppress(ValueError):
            value = parse_json(line)
            if isinstance(value, dict):
                found.append((line, value))
    return found


def _has_step(value: dict[str, Any]) -> bool:
    return isinstance(value.get("step"), int)
