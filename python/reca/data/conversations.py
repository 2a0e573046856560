"""LLaVA-style JSON: questions and answers about images."""

import errno
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from reca.data import index_files
from reca.data.chat_rows import BadRow, Row, image_name, turns
from reca.data.errors import DataError
from reca.data.folder import total_size
from reca.data.index_files import IndexFile
from reca.data.json_stream import read_items
from reca.data.packed_rows import PackedRows, finish, image_of, open_packed, pack
from reca.data.sample import MAX_IMAGE_BYTES, Sample, checked_size, digest
from reca.data.skipped import Skipped, log_once
from reca.data.text import decode_text
from reca.files import HEAD, packed, placeholder

LINES = (".jsonl", ".ndjson")  # of files that hold one row a line
FORM = '{"image": NAME, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}'


class Conversations:
    """A list of {"image": name, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}.

    A .jsonl holds one such row a line. Names of other chat formats are read too: "images" of one image, "messages"
    of "role" and "content".
    A question is what "human" (or "user") says, its answer what "gpt" (or "assistant") says behind it. A "system" turn
    in front becomes the beginning of the first question. One `<image>` may stand in the first question, and is removed.
    Rows of any other form are left out and counted by reason when the file is opened.
    """

    def __init__(self, path: Path, image_root: str | None):
        if not path.is_file():
            fault = "is no file" if path.exists() else "does not exist"
            raise DataError(
                f"conversations file {path} {fault}; give a LLaVA-style .json or .jsonl as data.conversations"
            )
        self.root = Path(image_root) if image_root else path.parent
        self.skipped = Skipped()
        try:
            large = path.stat().st_size >= index_files.LARGE
            self.rows = self._kept_rows(path) if large else self._read_rows(_load(path), path)
        except OSError as error:
            raise DataError(f"conversations file {path} cannot be read: {error.strerror}") from error
        if not self.rows:
            raise DataError(f"{path} holds no conversation about an image: {self.skipped or 'it is empty'}")
        if not self.root.is_dir():
            raise DataError(f"data.image_root {self.root} is no folder; give the one that the image names start from")
        self.skipped.warn(str(path))

    def _read_rows(self, items: Iterable[Any], path: Path, out: BinaryIO | None = None) -> PackedRows:
        """Pack the rows that can be used, and count the others. out: a file to write them to, in place of memory."""
        if out is not None:
            offsets, images = pack(self._rows(items, path), out)
            return PackedRows(out, offsets, images)
        buffer = io.BytesIO()
        offsets, images = pack(self._rows(items, path), buffer)
        return PackedRows(buffer.getvalue(), offsets, images)

    def _rows(self, items: Iterable[Any], path: Path) -> Iterator[Row]:
        root, found = os.path.abspath(self.root), False
        for number, item in enumerate(items, 1):
            found = found or isinstance(item, dict)
            try:
                yield Row(image_name(item, root), turns(item, number, self.skipped))
            except BadRow as error:
                self.skipped.add(str(error), f"row {number}")
        if not found:
            raise DataError(f"{path} is not LLaVA-style: expected a list of {FORM}")

    def _kept_rows(self, path: Path) -> PackedRows:
        """Return the rows of a large file, from its index, which is made where there is none."""
        index = IndexFile(path, "rows", os.path.abspath(self.root))
        found = open_packed(index.path, index.stamp)
        if found is None:
            with index.locked():
                found = open_packed(index.path, index.stamp)
                if found is None:
                    return self._make_index(path, index)
        rows, header = found
        self.skipped.merge(*header["skipped"])
        return rows

    def _make_index(self, path: Path, index: IndexFile) -> PackedRows:
        log_once(logging.INFO, f"{path}: making its index, once, in {index.path}")
        part = index.part()
        try:
            out = part.open("w+b")
        except OSError as error:
            index.cannot_keep(error)
            return self._read_rows(_stream(path), path)
        try:
            rows = self._read_rows(_stream(path), path, out)
            skipped = [self.skipped.counts, self.skipped.first]
            finish(out, rows.offsets, {"stamp": index.stamp, "images": rows.images, "skipped": skipped})
            out.flush()
            index.keep(part)
            return rows
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            index.cannot_keep(error)
            self.skipped = Skipped()
            return self._read_rows(_stream(path), path)
        finally:
            part.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> int:
        """Return how many images the rows are about."""
        return self.rows.images

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        with (self.root / row.image).open("rb") as file:
            checked_size(os.fstat(file.fileno()).st_size, MAX_IMAGE_BYTES, "image")
            return Sample(row.image, file.read(MAX_IMAGE_BYTES), list(row.turns))

    def key(self, index: int) -> str:
        return self.rows.name(index)

    def size(self, index: int) -> int:
        return total_size([self.root / self.rows.name(index)])

    def identity(self) -> str:
        sizes: dict[int, int] = {}  # by a hash of the name: many rows may ask about one image

        def size(image: str) -> int:
            if hash(image) not in sizes:
                sizes[hash(image)] = total_size([self.root / image])
            return sizes[hash(image)]

        def described() -> Iterator[tuple[bytes, int]]:
            for number in range(len(self)):
                record = self.rows.record(number)
                yield record, size(image_of(record))

        return digest(described())


def _stream(path: Path) -> Iterator[Any]:
    """Return the items of a large file, one after the other. Raises DataError as `_load`."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if cause := placeholder(head) or packed(head):
            raise DataError(f"conversations file {path} {cause}")
        yield from read_items(path, path.suffix.lower() in LINES)
    except TypeError as error:
        raise DataError(f"{path} is {error} and not LLaVA-style: expected a list of {FORM}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        hint = "; of rows one a line the name ends in .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path} is not JSON: {error}{hint}") from error


def _load(path: Path) -> list[Any]:
    try:
        data = path.read_bytes()
        if cause := placeholder(data[:HEAD]) or packed(data[:HEAD]):
            raise DataError(f"conversations file {path} {cause}")
        text = decode_text(data)
        items = _lines(text) if path.suffix.lower() in LINES else json.loads(text)
        if not isinstance(items, list):
            raise DataError(f"{path} is not LLaVA-style: expected a list of {FORM}")
        return items
    except OSError as error:
        raise DataError(f"conversations file {path} cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # of json, or of bytes that are no text
        hint = "; of rows one a line the name ends in .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path} is not JSON: {error}{hint}") from error


def _lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}, at its character {error.pos}") from error
    return rows
