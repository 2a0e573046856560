"""Records: what a judge said of every image, as JSON lines that only grow. Nothing that was judged is ever lost."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.eval.errors import EvaluationError
from reca.eval.files import HALVES
from reca.eval.suites import Item, Key, Suite
from reca.eval.suites.base import agree

log = logging.getLogger("reca")


class Record(NamedTuple):
    """picture: SHA-256 of the image. judge: see Judge.describe. error: in place of answer. digest: Item.judged."""

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
    """Records that others made, and the file or folder they were read from."""

    path: Path
    records: Mapping[Key, Record]


def parse(line: str) -> Record | None:
    """Read a line; None for one that is no record, such as half of one."""
    try:
        row = json.loads(line)
        found = Record(
            str(row["item"]),
            int(row["k"]),
            row.get("picture"),
            row.get("judge") or {},
            row.get("answer"),
            row.get("error"),
            row.get("digest"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    texts = all(text is None or isinstance(text, str) for text in (found.picture, found.error, found.digest))
    said = "answer" in row or found.error is not None
    return found if said and texts and isinstance(found.judge, Mapping) and found.k >= 0 else None


def read(path: Path) -> list[Record]:
    """Read all records of a file, [] if there is none. Lines that are none are counted in a warning."""
    if not path.is_file():
        return []
    # Lines end at line feeds alone: an answer may hold other separators of lines as they are.
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    found = [record for line in lines if (record := parse(line)) is not None]
    if len(found) < len(lines):
        count = len(lines) - len(found)
        log.warning("%s: %d of %d lines cannot be read; their images count as not judged", path, count, len(lines))
    return found


class Appender:
    """Appends lines to a file, each as a whole. A half-written last line, of a killed process, is ended first."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self.handle).st_size
            if size and os.pread(self.handle, 1, size - 1) != b"\n":
                os.write(self.handle, b"\n")
        except OSError as error:
            raise EvaluationError(f"{path} cannot be written ({error.strerror}); give another --out") from error

    def append(self, line: str) -> None:
        """Write a line. Raises EvaluationError when the disk does not take it; what was there stays."""
        data, before = line.encode("utf-8", HALVES) + b"\n", os.fstat(self.handle).st_size
        try:
            written, reason = os.write(self.handle, data), "the disk is full"
        except OSError as error:
            written, reason = 0, error.strerror or str(error)
        if written < len(data):
            with contextlib.suppress(OSError):
                os.ftruncate(self.handle, before)
            raise EvaluationError(
                f"{self.path} cannot be written ({reason}). All lines before are kept: make room and give the same "
                "command again, which goes on from there"
            )

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.handle)


def check_there(path: Path) -> None:
    """Raise EvaluationError where no file or folder of answers is."""
    if not path.exists():
        raise EvaluationError(f"{path} does not exist; expected records.jsonl or a benchmark's result file")


def _begins_with_record(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return parse(file.readline()) is not None


def import_answers(path: Path, suite: Suite, items: Sequence[Item]) -> dict[Key, Record]:
    """Read records of the judge that was asked last, or a result file of the benchmark's own scripts as records.

    Raises EvaluationError for a file that is neither, or holds nothing of these items as they are now.
    """
    check_there(path)
    try:
        foreign = None if _begins_with_record(path) else suite.import_answers(path, items)
    except EvaluationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise EvaluationError(f"{path} is no result file of {suite.name} ({error!r})") from error
    if foreign:
        judge = {"name": f"imported:{path.name}", "version": None, "dtype": None, "exact": None}
        return {key: Record(*key, None, judge, answer) for key, answer in foreign.items()}
    known = {item.id: item.judged for item in items}
    named = [r for r in read(path) if r.error is None and r.item in known]
    own = [record for record in named if agree(record.digest, known[record.item])]
    if named and not own:
        raise EvaluationError(
            f"{path} holds answers about other prompts, sources or questions than {suite.name} has now under the same "
            "ids; give the options and files of the suite that it was recorded with, or judge again"
        )
    if not own:
        raise EvaluationError(
            f"{path} holds no answers about the items of {suite.name}: it is neither a records.jsonl of this suite nor "
            "a result file that its own scripts write"
        )
    return {record.key: record for record in own if record.judge == own[-1].judge}
