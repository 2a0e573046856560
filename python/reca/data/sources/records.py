"""Records of an index, concatenated in a file or in memory, with the offset of each.

records   the bytes of all records
offsets   uint64 [records + 1], little-endian
header    JSON: stamp, number of records, digest of the offsets, facts
end       length of the header in 8 bytes, MAGIC
"""

import errno
import hashlib
import io
import itertools
import json
import logging
import os
from array import array
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reca.data.sources.index_files import IndexFile
from reca.data.sources.skipped import log_once
from reca.io.files import parse_json

MAGIC = b"RECAROWS"
AT_ONCE = 4096  # records per read, if all are read
Facts = dict[str, Any]  # JSON-serialisable: what is known of all records
Write = Callable[[bytes], Any]
Make = Callable[[Write], Facts]  # calls a function with every record, in order


class Records:
    """Random access to records, one at a time. Those of a file are read on demand, so all ranks share its pages."""

    def __init__(self, data: bytes | BinaryIO, offsets: np.ndarray):
        self.data, self.offsets = data, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._read(int(self.offsets[number]), int(self.offsets[number + 1]))

    def _read(self, start: int, end: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[start:end]
        return os.pread(self.data.fileno(), end - start, start)  # mapped pages would count as memory of the process

    def find(self, heads: Set[bytes], end: bytes) -> list[int]:
        """Return the numbers of the records whose bytes before the first `end` are one of `heads`."""
        found: list[int] = []
        for first in range(0, len(self), AT_ONCE):
            places = self.offsets[first : first + AT_ONCE + 1].tolist()
            begin, data = places[0], self._read(places[0], places[-1])
            records = (data[start - begin : stop - begin] for start, stop in itertools.pairwise(places))
            found += [first + n for n, record in enumerate(records) if record.partition(end)[0] in heads]
        return found


def in_memory(make: Make) -> tuple[Records, Facts]:
    """Return the records that `make` passes on, and its facts."""
    buffer = io.BytesIO()
    offsets, facts = _write(make, buffer)
    return Records(buffer.getvalue(), offsets), facts


def kept(index: IndexFile, make: Make) -> tuple[Records, Facts]:
    """Return the records and facts of an index file, which is built if missing."""
    found = _open(index.path, index.stamp)
    if found is None:
        with index.locked():
            found = _open(index.path, index.stamp) or _build(index, make)
    return found


def _build(index: IndexFile, make: Make) -> tuple[Records, Facts]:
    log_once(logging.INFO, f"{index.name}: building the index, once, in {index.path}")
    part = index.part()
    try:
        out = part.open("w+b")
    except OSError as error:
        index.cannot_keep(error)
        return in_memory(make)
    try:
        offsets, facts = _write(make, out)
        _finish(out, offsets, {"stamp": index.stamp, "facts": facts})
        index.keep(part)
        return Records(out, offsets), facts
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        index.cannot_keep(error)
        return in_memory(make)
    finally:
        part.unlink(missing_ok=True)


def _write(make: Make, out: BinaryIO) -> tuple[np.ndarray, Facts]:
    offsets = array("Q", [0])

    def write(record: bytes) -> None:
        out.write(record)
        offsets.append(offsets[-1] + len(record))

    facts = make(write)
    return np.frombuffer(offsets, np.uint64), facts


def _finish(out: BinaryIO, offsets: np.ndarray, header: dict[str, Any]) -> None:
    """Write everything after the records: offsets, header and end."""
    table = offsets.astype("<u8").tobytes()
    out.write(table)
    text = json.dumps(header | {"records": len(offsets) - 1, "digest": hashlib.sha256(table).hexdigest()}).encode()
    out.write(text + len(text).to_bytes(8, "little") + MAGIC)
    out.flush()


def _open(path: Path, stamp: list) -> tuple[Records, Facts] | None:
    """Open a file of records. Return None if it is missing, damaged, or has another stamp."""
    try:
        file = path.open("rb")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 16))
        end = file.read(16)
        length = int.from_bytes(end[:8], "little")
        if end[8:] != MAGIC or length > size:
            return None
        file.seek(size - 16 - length)
        header = parse_json(file.read(length))
        table = size - 16 - length - 8 * (header["records"] + 1)
        offsets = np.memmap(path, "<u8", "r", table, (header["records"] + 1,))
        if hashlib.sha256(offsets.data).hexdigest() != header["digest"] or int(offsets[-1]) != table:
            return None
        return (Records(file, offsets), header["facts"]) if header["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
