"""Records: a judge's answer about each image, in an append-only JSON-lines file."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.eval.errors import EvaluationError
from reca.eval.files import encoded
from reca.eval.suites import Item, Key, Suite
from reca.eval.suites.base import agree
from reca.io.files import parse_json
from reca.io.paths import exists, is_file
from reca.options.names import option

log = logging.getLogger("reca")


class Record(NamedTuple):
    """A judge's answer about one image, or its error.

    picture  SHA-256 of the image file
    judge    see Judge.describe
    error    message of a failed judgement; None if there is an answer
    digest   Item.digest
    """

    item: str
    k: int
    picture: str | None
    judge: Mapping[str, Any]
    answer: Any = None
    error: str | None = None
    digest: str | None = None

    @property
    def key(self) -> Key:
        return self.item, self.k

    def line(self) -> str:
        said = {"answer": self.answer} if self.error is None else {"error": self.error}
        head = {"item": self.item, "k": self.k, "picture": self.picture, "digest": self.digest}
        head |= {"judge": dict(self.judge)}
        return json.dumps(head | said, ensure_ascii=False)


class Imported(NamedTuple):
    """Records from elsewhere (--records), and the file or folder from which they were read."""

    path: Path
    records: Mapping[Key, Record]


def parse(line: str) -> Record | None:
    """Parse a line. Return None if it is not a valid record, for example truncated."""
    try:
        row = parse_json(line)
        found = Record(
            str(row["item"]),
            int(row["k"]),
            row.get("picture"),
            row.get("judge") or {},
            row.get("answer"),
            row.get("error"),
            row.get("digest"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    texts = all(text is None or isinstance(text, str) for text in (found.picture, found.error, found.digest))
    said = "answer" in row or found.error is not None
    return found if said and texts and isinstance(found.judge, Mapping) and found.k >= 0 else None


def read(path: Path) -> list[Record]:
    """Read all records of a file; [] if it does not exist. Log a warning with the number of invalid lines."""
    if not is_file(path):
        return []
    # Split at line feeds only: an answer can contain other line separators, unescaped.
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    found = [record for line in lines if (record := parse(line)) is not None]
    if len(found) < len(lines):
        count = len(lines) - len(found)
        log.warning("%s: %d of %d lines cannot be read; their images count as not judged", path, count, len(lines))
    return found


class Appender:
    """Appends whole lines to a file. An incomplete last line, left by a killed process, is terminated first."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self.handle).st_size
            if size and os.pread(self.handle, 1, size - 1) != b"\n":
                os.write(self.handle, b"\n")
        except OSError as error:
            raise EvaluationError(
                f"{path} cannot be written ({error.strerror}); set another {option('out')}"
            ) from error

    def append(self, line: str) -> None:
        """Write a line. If that fails, restore the file to its previous length and raise EvaluationError."""
        data, before = encoded(line) + b"\n", os.fstat(self.handle).st_size
        try:
            written, reason = os.write(self.handle, data), "the disk is full"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(self.handle, before)
            raise EvaluationError(
                f"{self.path} cannot be written ({reason}). All previous lines are kept: free disk space, then run the "
                "same command again to resume"
            )

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.handle)


def check_there(path: Path) -> None:
    """Raise EvaluationError if the file or folder of answers does not exist."""
    if not exists(path):
        raise EvaluationError(f"{path} does not exist; expected records.jsonl or a benchmark's result file")


def _begins_with_record(path: Path) -> bool:
    if not is_file(path):
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return parse(file.readline()) is not None


def import_answers(path: Path, suite: Suite, items: Sequence[Item]) -> dict[Key, Record]:
    """Read the records of the last judge in a file, or convert a result file of the benchmark's own scripts to records.

    Raises EvaluationError if the file is neither, or has no answers about the current version of these items.
    """
    check_there(path)
    try:
        foreign = None if _begins_with_record(path) else suite.import_answers(path, items)
    except EvaluationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EvaluationError(f"{path} is not a valid result file of {suite.name} ({error!r})") from error
    if foreign:
        judge = {"name": f"imported:{path.name}", "version": None, "dtype": None, "exact": None}
        return {key: Record(*key, None, judge, answer) for key, answer in foreign.items()}
    known = {item.id: item.digest for item in items}
    named = [r for r in read(path) if r.error is None and r.item in known]
    own = [record for record in named if agree(record.digest, known[record.item])]
    if named and not own:
        raise EvaluationError(
            f"{path} contains answers about other prompts, sources or questions than {suite.name} now has under the "
            "same ids; use the suite's options and files with which it was recorded, or judge again"
        )
    if not own:
        raise EvaluationError(
            f"{path} contains no answers about the items of {suite.name}; expected a records.jsonl of this suite or a "
            "result file of the benchmark's own scripts"
        )
    return {record.key: record for record in own if record.judge == own[-1].judge}
