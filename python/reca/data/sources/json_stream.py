"""Streaming parser of JSON lists and JSON lines: reads files of gigabytes in a few megabytes of memory."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, TextIO

from reca.data.sources.remote import AnyPath, open_stream
from reca.data.text import SIGNATURES
from reca.io.files import parse_json

CHUNK = 2**20  # characters per read
LONGEST = 2**26  # maximal characters of an item or line
BLANKS = " \t\n\r"


def read_items(path: AnyPath, lines: bool) -> Iterator[Any]:
    """Yield the items of a JSON list, or with `lines` of a JSON lines file.

    Raises ValueError with the position if it is not JSON or a line is a list, TypeError if the JSON is not a list, and
    OSError.
    """
    with open_stream(path) as file:
        encoding = _encoding(file)
        file.seek(0)
        text = io.TextIOWrapper(file, encoding)  # converts all line ends to \n
        try:
            yield from parse_lines(iter(lambda: text.readline(LONGEST + 1), "")) if lines else _list(text)
        except UnicodeDecodeError as error:
            raise ValueError(f"the text is not {encoding.upper()} ({error.reason}): save it as UTF-8") from error


def _encoding(file: BinaryIO) -> str:
    head = file.read(4)
    mark, name = next(((mark, name) for mark, name in SIGNATURES if head.startswith(mark)), (b"", "utf-8"))
    if mark == codecs.BOM_UTF8:
        return "utf-8-sig"
    return name.rpartition("-")[0] if mark else name  # the utf-16 and utf-32 codecs consume the mark


def parse_lines(lines: Iterable[str]) -> Iterator[Any]:
    """Yield the row of each line. Raises ValueError if a line is too long, not JSON, or a list instead of one row."""
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            raise ValueError(f"line {number} has more than {LONGEST} characters")
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}, at character {error.pos} of the line") from error
        if isinstance(row, list):
            raise ValueError(
                f"line {number} is a list, but each line should be a row; rename the file to .json if it is a list"
            )
        yield row


class _Buffer:
    """The part of a text that is being parsed."""

    def __init__(self, text: TextIO):
        self.text, self.part, self.place, self.before, self.ended = text, "", 0, 0, False

    def more(self) -> bool:
        """Drop the parsed text and read more: a chunk, or as much as is left unparsed. Return False at the end."""
        self.before += self.place
        self.part = self.part[self.place :]
        self.place = 0
        new = self.text.read(max(CHUNK, len(self.part)))
        if "\0" in new:
            raise ValueError(
                "the text contains NUL characters, like UTF-16 without a byte order mark: save it as UTF-8"
            )
        self.part += new
        self.ended = not new
        return bool(new)

    def peek(self) -> str:
        """Return the next non-blank character without consuming it; "" at the end."""
        while True:
            while self.place < len(self.part):
                if self.part[self.place] not in BLANKS:
                    return self.part[self.place]
                self.place += 1
            if not self.more():
                return ""

    def item(self) -> Any:
        decoder = json.JSONDecoder()
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self.part, self.place)
                # A number may continue in text that is not read yet: 3 may become 3e7.
                if self.ended or self.part[end : end + 1].startswith(tuple(f"{BLANKS},]")):
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise ValueError(f"{error.msg}, at character {self.before + error.pos}") from error
            if len(self.part) - self.place > LONGEST:
                raise ValueError(f"an item of more than {LONGEST} characters, at character {self.before + self.place}")
            self.more()

    def end(self) -> None:
        """Raise ValueError if anything but blanks is left."""
        if self.peek():
            raise ValueError(f"Extra data, at character {self.before + self.place}")

    def fail(self, expected: str) -> ValueError:
        return ValueError(f"Expecting {expected}, at character {self.before + self.place}")


def _list(text: TextIO) -> Iterator[Any]:
    buffer = _Buffer(text)
    if buffer.peek() != "[":
        value = buffer.item()
        buffer.end()
        raise TypeError(f"a JSON {type(value).__name__}")
    buffer.place += 1
    if buffer.peek() == "]":
        buffer.place += 1
    else:
        while True:
            yield buffer.item()
            after = buffer.peek()
            if after not in (",", "]"):
                raise buffer.fail("',' delimiter")
            buffer.place += 1
            if after == "]":
                break
    buffer.end()
