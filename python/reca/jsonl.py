"""JSON lines that a run leaves behind; a full disk loses lines and never the run."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from reca.folders import replace_text

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
    """The whole lines of a file; torn ones, and a file that is not there, are nothing."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def keep_until(path: Path, update: int) -> None:
    """Drop the lines of later updates, which a run that goes on from `update` is going to write again."""
    lines = read(path)
    kept = [line for line in lines if line.get("update", 0) <= update]
    if len(kept) < len(lines):
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
