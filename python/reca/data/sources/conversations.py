"""LLaVA-style JSON: questions and answers about images."""

import errno
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from reca.data.errors import DataError
from reca.data.sample import MAX_IMAGE_BYTES, Sample, digest
from reca.data.sources import index_files
from reca.data.sources.chat_rows import BadRow, Row, absolute, image_name, turns
from reca.data.sources.folder import total_size
from reca.data.sources.index_files import IndexFile
from reca.data.sources.json_rows import Form, cannot_be_read, load_rows, stream_rows
from reca.data.sources.packed_rows import PackedRows, finish, image_of, open_packed, pack
from reca.data.sources.remote import AnyPath, RemotePath, read_whole, to_path
from reca.data.sources.skipped import Skipped, log_once

FORM = Form(
    "conversations file",
    "LLaVA-style",
    '{"image": NAME, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}',
)


class Conversations:
    """A list of {"image": name, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}.

    A .jsonl has one such row per line. The keys of other chat formats are supported as well: "images" with one image,
    and "messages" with "role" and "content", where content may be a list of text parts and the image.
    A question is a turn of "human" (or "user"), its answer the next turn, of "gpt" (or "assistant"). A leading "system"
    turn, or the row's "system" key, is prepended to the first question. The first question may contain one `<image>`,
    which is removed.
    Rows of any other form are skipped and counted by reason when the file is opened.

    File and images may be at URLs. A remote file is streamed once, whatever its size; its index is saved if the server
    identifies versions. Sizes of remote images are not read, since each would take a request.
    """

    def __init__(self, path: AnyPath, image_root: str | None):
        if not path.is_file():
            fault = "is not a file" if path.exists() else "does not exist"
            raise DataError(
                f"conversations file {path} {fault}; give a LLaVA-style .json or .jsonl as data.conversations"
            )
        self.root = to_path(image_root) if image_root else path.parent
        self.skipped = Skipped()
        try:
            if isinstance(path, RemotePath):
                versioned = path.version() is not None
                self.rows = self._kept_rows(path) if versioned else self._read_rows(stream_rows(path, FORM), path)
            elif path.stat().st_size >= index_files.LARGE:
                self.rows = self._kept_rows(path)
            else:
                self.rows = self._read_rows(load_rows(path, FORM), path)
        except OSError as error:
            raise cannot_be_read(path, FORM, error) from error
        if not self.rows:
            raise DataError(f"{path} has no conversation about an image: {self.skipped or 'it is empty'}")
        if isinstance(self.root, Path) and not self.root.is_dir():
            raise DataError(f"data.image_root {self.root} is not a folder; set the folder that image names start from")
        self.skipped.warn(str(path))

    def _read_rows(self, items: Iterable[Any], path: AnyPath, out: BinaryIO | None = None) -> PackedRows:
        """Pack the usable rows and count the others. out: file to write them to; None: memory."""
        if out is not None:
            offsets, images = pack(self._rows(items, path), out)
            return PackedRows(out, offsets, images)
        buffer = io.BytesIO()
        offsets, images = pack(self._rows(items, path), buffer)
        return PackedRows(buffer.getvalue(), offsets, images)

    def _rows(self, items: Iterable[Any], path: AnyPath) -> Iterator[Row]:
        root, found = absolute(self.root), False
        for number, item in enumerate(items, 1):
            found = found or isinstance(item, dict)
            try:
                yield Row(image_name(item, root), turns(item, number, self.skipped))
            except BadRow as error:
                self.skipped.add(f"rows that {error}", f"row {number}")
        if not found:
            raise FORM.wrong(path)

    def _kept_rows(self, path: AnyPath) -> PackedRows:
        """Return the rows of a large file from its index, which is built if missing."""
        index = IndexFile(path, "rows", absolute(self.root))
        found = open_packed(index.path, index.stamp)
        if found is None:
            with index.locked():
                found = open_packed(index.path, index.stamp)
                if found is None:
                    return self._make_index(path, index)
        rows, header = found
        self.skipped.merge(*header["skipped"])
        return rows

    def _make_index(self, path: AnyPath, index: IndexFile) -> PackedRows:
        log_once(logging.INFO, f"{path}: building its index, once, in {index.path}")
        part = index.part()
        try:
            out = part.open("w+b")
        except OSError as error:
            index.cannot_keep(error)
            return self._read_rows(stream_rows(path, FORM), path)
        try:
            rows = self._read_rows(stream_rows(path, FORM), path, out)
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
            return self._read_rows(stream_rows(path, FORM), path)
        finally:
            part.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> int:
        """Return the number of distinct images."""
        return self.rows.images

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        return Sample(row.image, read_whole(self.root / row.image, MAX_IMAGE_BYTES, "image"), list(row.turns))

    def key(self, index: int) -> str:
        return self.rows.name(index)

    def size(self, index: int) -> int:
        """Return the bytes of the image; 0 if it is at a URL."""
        return 0 if isinstance(self.root, RemotePath) else total_size([self.root / self.rows.name(index)])

    def identity(self) -> str:
        sizes: dict[int, int] = {}  # by hash of the name: many rows may share an image

        def size(image: str) -> int:
            if isinstance(self.root, RemotePath):
                return 0
            if hash(image) not in sizes:
                sizes[hash(image)] = total_size([self.root / image])
            return sizes[hash(image)]

        def described() -> Iterator[tuple[bytes, int]]:
            for number in range(len(self)):
                record = self.rows.record(number)
                yield record, size(image_of(record))

        return digest(described())
