"""Rows of conversations, concatenated in a file or in memory, with the offset of each.

rows      name of the image, a zero byte, JSON of the turns; concatenated
offsets   uint64 [rows + 1], little-endian
header    JSON: stamp, rows, images, skipped, digest of the offsets
end       length of the header in 8 bytes, MAGIC
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reca.data.sources.chat_rows import Row
from reca.data.tasks import Turn

MAGIC = b"RECAROWS"


class PackedRows:
    """Random access to packed rows, one at a time.

    images: number of distinct images.
    """

    def __init__(self, data: bytes | BinaryIO, offsets: np.ndarray, images: int):
        self.data, self.offsets, self.images = data, offsets, images

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Row:
        name, _, turns = self.record(number).partition(b"\0")
        return Row(name.decode(), tuple(Turn(*turn) for turn in json.loads(turns)))

    def name(self, number: int) -> str:
        """Return the name of a row's image."""
        return image_of(self.record(number))

    def record(self, number: int) -> bytes:
        """Return the stored bytes of a row."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, end = int(self.offsets[number]), int(self.offsets[number + 1])
        if isinstance(self.data, bytes):
            return self.data[start:end]
        return os.pread(self.data.fileno(), end - start, start)  # mapped pages would count as memory of the process


def image_of(record: bytes) -> str:
    """Return the name of a stored row's image."""
    return record.partition(b"\0")[0].decode()


def pack(rows: Iterable[Row], out: BinaryIO) -> tuple[np.ndarray, int]:
    """Write rows. Return their offsets and the number of distinct images."""
    offsets, images, place = array("Q", [0]), array("q"), 0
    for row in rows:
        record = row.image.encode() + b"\0" + json.dumps(row.turns, ensure_ascii=False).encode()
        out.write(record)
        place += len(record)
        offsets.append(place)
        images.append(hash(row.image))
    return np.frombuffer(offsets, np.uint64), np.unique(np.frombuffer(images, np.int64)).size


def finish(out: BinaryIO, offsets: np.ndarray, header: dict[str, Any]) -> None:
    """Write everything after the rows: offsets, header and end."""
    table = offsets.astype("<u8").tobytes()
    out.write(table)
    text = json.dumps(header | {"rows": len(offsets) - 1, "digest": hashlib.sha256(table).hexdigest()}).encode()
    out.write(text + len(text).to_bytes(8, "little") + MAGIC)


def open_packed(path: Path, stamp: list) -> tuple[PackedRows, dict[str, Any]] | None:
    """Open a file of packed rows. Return None if it is missing, damaged, or has another stamp."""
    try:
        file = path.open("rb")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16))
        end = file.read(16)
        length = int.from_bytes(end[:8], "little")
        if end[8:] != MAGIC or length > size:
            return None
        file.seek(size - 16 - length)
        header = json.loads(file.read(length))
        table = size - 16 - length - 8 * (header["rows"] + 1)
        offsets = np.memmap(path, "<u8", "r", table, (header["rows"] + 1,))
        if hashlib.sha256(offsets.data).hexdigest() != header["digest"] or int(offsets[-1]) != table:
            return None
        return (PackedRows(file, offsets, header["images"]), header) if header["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
