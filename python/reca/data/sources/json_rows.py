"""Rows of a JSON list or a JSON lines file, local or at a URL."""

import json
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

from reca.data.errors import DataError
from reca.data.sample import suffix_of
from reca.data.sources import records
from reca.data.sources.index_files import IndexFile
from reca.data.sources.json_stream import parse_lines, read_items
from reca.data.sources.records import Facts, Records, Write
from reca.data.sources.remote import AnyPath, read_range, reason_of
from reca.data.text import decode_text
from reca.io.files import HEAD, packed, parse_json, placeholder

LINES = (".jsonl", ".ndjson")  # suffixes of files with one row per line
END = b"\0"  # of the key in a record


class Form(NamedTuple):
    """Expected form of a file, for messages: the file ("conversations file"), the form's name, and an example row."""

    file: str
    name: str
    row: str

    def wrong(self, path: AnyPath) -> DataError:
        return DataError(f"{path} is not {self.name}: expected a list of {self.row}")


class KeyedRows:
    """Rows of a source, kept as records of a key, END, and JSON."""

    rows: Records

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return key_of(self.rows[index])

    def indices_of(self, keys: Set[str]) -> list[int]:
        """Return the indices of the samples with these keys."""
        return self.rows.find({key.encode("utf-8", "surrogatepass") for key in keys}, END)  # of files, with any names

    def value(self, index: int) -> Any:
        """Return the JSON of a row."""
        return parse_json(self.rows[index].partition(END)[2])


def keyed(key: str, value: Any) -> bytes:
    """Return the record of a row."""
    return key.encode() + END + json.dumps(value, ensure_ascii=False).encode()


def key_of(record: bytes) -> str:
    return record.partition(END)[0].decode()


def holds_lines(path: AnyPath) -> bool:
    return suffix_of(path.name) in LINES


def load_rows(path: Path, form: Form) -> list[Any]:
    """Read a whole file. Raises DataError if it is not JSON or not a list."""
    try:
        data = path.read_bytes()
        if cause := placeholder(data[:HEAD]) or packed(data[:HEAD]):
            raise DataError(f"{form.file} {path} {cause}")
        text = decode_text(data)
        items = list(parse_lines(text.split("\n"))) if holds_lines(path) else parse_json(text)
        if not isinstance(items, list):
            raise form.wrong(path)
        return items
    except OSError as error:
        raise _cannot_be_read(path, form, error) from error
    except DataError:
        raise
    except ValueError as error:  # invalid JSON or invalid text
        raise _no_json(path, error) from error


def stream_rows(path: AnyPath, form: Form) -> Iterator[Any]:
    """Yield the rows of a large file one by one. Raises DataError like `load_rows`, and OSError."""
    try:
        head = read_range(path, 0, HEAD)
        if cause := placeholder(head) or packed(head):
            raise DataError(f"{form.file} {path} {cause}")
        yield from read_items(path, holds_lines(path))
    except TypeError as error:
        raise DataError(f"{path} is {error} and not {form.name}: expected a list of {form.row}") from error
    except DataError:
        raise
    except ValueError as error:
        raise _no_json(path, error) from error


def kept_rows(
    path: AnyPath, form: Form, make: Callable[[Iterable[Any], Write], Facts], kind: str, *depends: Any
) -> tuple[Records, Facts]:
    """Return the records that `make` writes of a file's rows, and its facts.

    A large file, and a remote one of any size, is streamed once; its index file is of `kind` and depends on `depends`.
    Raises DataError like `load_rows`.
    """
    try:
        index = IndexFile([path], kind, *depends)
        if isinstance(path, Path) and not index.is_large:
            return records.in_memory(lambda write: make(load_rows(path, form), write))

        def streamed(write: Write) -> Facts:
            return make(stream_rows(path, form), write)

        return records.kept(index, streamed) if index.is_safe else records.in_memory(streamed)
    except OSError as error:
        raise _cannot_be_read(path, form, error) from error


def _cannot_be_read(path: AnyPath, form: Form, error: OSError) -> DataError:
    return DataError(f"{form.file} {path} cannot be read: {reason_of(error, path)}")


def _no_json(path: AnyPath, error: Exception) -> DataError:
    hint = "; rename it to .jsonl if it has one row per line" if "Extra data" in str(error) else ""
    return DataError(f"{path} is not JSON: {error}{hint}")
