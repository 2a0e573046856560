"""Parquet files with columns of images, captions and conversations, as published on Hugging Face."""

import bisect
import functools
import hashlib
import io
import logging
import re
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from reca import units
from reca.data.config import ColumnsConfig
from reca.data.errors import BadSample, DataError
from reca.data.order import WINDOW, Block
from reca.data.read_ahead import read_ahead
from reca.data.recently_used import RecentlyUsed
from reca.data.sample import Sample, digest
from reca.data.sources.columns import BYTES, IMAGE, LIST, NULL, OTHER, TEXT, choose, is_json, make_sample
from reca.data.sources.patterns import relative_names, some
from reca.data.sources.remote import REQUESTS, AnyPath, Ranges, RemotePath, read_range, reason_of, to_path
from reca.data.sources.skipped import Skipped, log_once
from reca.io.files import HEAD, packed, placeholder

LARGE = 2**29  # bytes; a warning is logged for larger row groups
DECODED = 64  # rows at once: pyarrow cannot decode 2 GiB of a nested column, such as {bytes, path}, in one piece
MAGIC = b"PAR1"
SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?![A-Za-z])")


class Group(NamedTuple):
    """A row group: index of its file, its number there, first row in the file, number of rows, bytes of its columns."""

    file: int
    number: int
    first: int
    rows: int
    bytes: int


class Parquet:
    """Rows of parquet files. A row is read together with its row group, and recently used groups stay in memory.

    The index lists row groups, not rows, so opening a file reads only its footer. Groups without an image, by the
    statistics there, are skipped: each of their rows would be replaced by one of any other group, which had to be read.
    A sample's key is FILE:ROW, with rows counted from 0.
    """

    def __init__(self, paths: Sequence[AnyPath], task: str, columns: ColumnsConfig, image_root: str | None = None):
        self.paths, self.task = list(paths), task
        self.names = relative_names(paths)
        self.root = to_path(image_root) if image_root else None
        self.footers: list[str] = []
        self.groups: list[Group] = []
        self.skipped = Skipped()
        self.columns: Any = None  # Columns, once the first file is open
        for file, (metadata, footer) in enumerate(read_ahead(read_footer, self.paths, REQUESTS)):
            self.footers.append(footer)
            self._add(file, self.paths[file], metadata, columns)
        if not self.groups:
            why = f"images: skipped {self.skipped}" if self.skipped else "rows"
            raise DataError(f"{some(self.paths)}: the parquet files have no {why}")
        self.skipped.warn(some(self.paths))
        self.starts = np.cumsum([0, *(group.rows for group in self.groups)])
        self.images = int(self.starts[-1])  # distinct ones: no two have the same key
        self.blocks = [Block(group.rows, group.bytes) for group in self.groups]
        self.metadata = functools.lru_cache(maxsize=64)(self._metadata)
        self.tables = RecentlyUsed(self._load, lambda number: self.groups[number].bytes, 2 * WINDOW)
        self._warn_of_large_groups()

    def _add(self, file: int, path: AnyPath, metadata: Any, config: ColumnsConfig) -> None:
        """Add the row groups of a file. One without rows may have columns without a type."""
        if not metadata.num_rows:
            return
        try:
            schema = metadata.schema.to_arrow_schema()
        except (ValueError, NotImplementedError) as error:
            raise DataError(f"{path} has a schema that pyarrow cannot read: {error}") from error
        columns = choose({field.name: form_of(field.type) for field in schema}, self.task, config, str(path))
        if twice := [name for name in columns.names if schema.names.count(name) > 1]:
            raise DataError(f"{path} has {schema.names.count(twice[0])} columns named {twice[0]!r}: rename one of them")
        if self.columns not in (None, columns):
            raise DataError(
                f"{path} has the columns {', '.join(columns.names)}, {self.paths[0]} {', '.join(self.columns.names)}: "
                "name the columns in data.columns.image, .caption and .conversations, or the files as two sources"
            )
        self.columns, first = columns, 0
        leaves = _leaves(metadata, columns.names)
        # The logical type UNKNOWN is parquet's for a column of nulls, which has no statistics.
        images = [
            n for n in _leaves(metadata, [columns.image]) if metadata.schema.column(n).logical_type.type != "UNKNOWN"
        ]
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if group.num_rows < 0:
                raise DataError(f"{path} is damaged: row group {number} has {group.num_rows} rows; fetch it again")
            size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
            if group.num_rows and all(_is_empty(group.column(leaf)) for leaf in images):
                self.skipped.add("row groups without an image", f"{self.names[file]}:{first}")
            elif group.num_rows:
                self.groups.append(Group(file, number, first, group.num_rows, size))
            first += group.num_rows

    def _warn_of_large_groups(self) -> None:
        largest = max(self.groups, key=lambda group: group.bytes)
        if largest.bytes > LARGE:
            log_once(
                logging.WARNING,
                f"{self.paths[largest.file]}: a row group has {units.size(largest.bytes)}, and reading a row reads "
                "its whole group. Rewrite the files with smaller groups (row_group_size=100 of pyarrow's "
                "write_table)",
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        number, row = self._place(index)
        group, table = self.groups[number], self.tables(number)
        root = self.root or self.paths[group.file].parent
        return make_sample(self.key(index), table, row, self.columns, self.task, root)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the group of a sample and its row in that group."""
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return number, index - int(self.starts[number])

    def _metadata(self, file: int) -> Any:
        path = self.paths[file]
        metadata, footer = _footer(path.again() if isinstance(path, RemotePath) else path)
        if footer != self.footers[file]:
            raise DataError(f"{path} has other rows than when the run began")
        return metadata

    def _load(self, number: int) -> Any:
        """Read a row group's columns. Raises BadSample if its bytes are damaged."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        group, names = self.groups[number], self.columns.names
        try:
            path = self.paths[group.file]
            source = Ranges(path) if isinstance(path, RemotePath) else path
            metadata, one_request = self.metadata(group.file), isinstance(source, Ranges)
            with ParquetFile(source, metadata=metadata, pre_buffer=one_request) as file:
                parts = file.iter_batches(DECODED, [group.number], columns=names, use_threads=False)
                table = pyarrow.Table.from_batches(parts)
            if table.num_rows != group.rows:
                raise BadSample(
                    f"row group {group.number} has {table.num_rows} rows, not {group.rows} as the footer says"
                )
            return table
        except OSError as error:
            if error.errno is not None:
                raise
            raise BadSample(f"row group {group.number} cannot be read: {error}") from error
        except (ValueError, DataError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise BadSample(f"row group {group.number} cannot be read: {error}") from error

    def key(self, index: int) -> str:
        number, row = self._place(index)
        group = self.groups[number]
        return f"{self.names[group.file]}:{group.first + row}"

    def indices_of(self, keys: Set[str]) -> list[int]:
        """Return the indices of the samples with these keys."""
        groups: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            groups.setdefault(self.names[group.file], []).append(number)
        found = set()
        for name, _, row in (key.rpartition(":") for key in keys):
            if row.isdecimal() and (own := groups.get(name)):
                after = bisect.bisect_right(own, int(row), key=lambda number: self.groups[number].first)
                number = own[max(0, after - 1)]
                found.add(int(self.starts[number]) + int(row) - self.groups[number].first)
        # A row may be in no group, and a number can have more than one form.
        return [index for index in found if 0 <= index < len(self) and self.key(index) in keys]

    def size(self, index: int) -> int:
        """Return the bytes of the row's file, which change when the file is rewritten; -1 if they are unknown."""
        try:
            return self.paths[self.groups[self._place(index)[0]].file].stat().st_size
        except OSError:
            return -1

    def identity(self) -> str:
        left_out = [self.skipped.counts] if self.skipped else []  # earlier versions had these row groups as samples
        return digest([tuple(self.columns), *zip(self.names, self.footers, strict=True), *left_out])


def _leaves(metadata: Any, names: Sequence[str]) -> list[int]:
    """Return the numbers of the leaf columns of these columns."""
    starts = tuple(f"{name}." for name in names)
    return [n for n in range(metadata.num_columns) if f"{metadata.schema.column(n).path}.".startswith(starts)]


def _is_empty(column: Any) -> bool:
    """Return whether the statistics of a leaf column say that a row group has no value in it."""
    found = column.statistics
    return found is not None and found.has_null_count and found.null_count == column.num_values


def form_of(kind: Any) -> str:
    """Return the form of a column with an Arrow type: IMAGE, BYTES, TEXT, LIST, NULL or OTHER."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if is_json(kind):
        return LIST
    if types.is_struct(kind):
        parts = {kind.field(i).name: form_of(kind.field(i).type) for i in range(kind.num_fields)}
        return IMAGE if parts.get("bytes") in (BYTES, NULL) else OTHER
    if any(
        test(kind)
        for test in (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    ):
        return BYTES
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return TEXT
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = form_of(kind.value_type)
        return item if item in (IMAGE, NULL) else LIST
    return NULL if types.is_null(kind) else OTHER


def read_footer(path: AnyPath) -> tuple[Any, str]:
    """Return the metadata of a parquet file, and a digest of its size and footer, which locates all columns.

    Raises DataError if the file cannot be read, is not parquet or is truncated.
    """
    try:
        return _footer(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_of(error, path)}") from error


def _footer(path: AnyPath) -> tuple[Any, str]:
    """Return what `read_footer` returns. Raises OSError if the file cannot be read."""
    from pyarrow.parquet import read_metadata

    size = path.stat().st_size
    head, tail = read_range(path, 0, HEAD), read_range(path, max(0, size - 8), 8)
    if head[:4] != MAGIC or tail[4:] != MAGIC or size < 12:
        cause = placeholder(head) or packed(head)
        cut = "is cut off: it has no footer; fetch it again" if head[:4] == MAGIC else "is not a parquet file"
        raise DataError(f"{path} {cause or cut}")
    length = int.from_bytes(tail[:4], "little")
    footer = read_range(path, max(0, size - 8 - length), length)
    try:
        metadata = read_metadata(io.BytesIO(MAGIC + footer + tail))
        return metadata, hashlib.sha256(b"%d " % size + footer).hexdigest()
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises any of them for damaged bytes
        raise DataError(f"{path} is not a readable parquet file: {error}; fetch it again") from error


def one_split(paths: Sequence[AnyPath], where: object) -> Sequence[AnyPath]:
    """Return the files. Raises DataError if they are of several splits, such as train and test.

    where: folder or pattern, for the message.
    """
    named = sorted(zip(relative_names(paths), paths, strict=True), reverse=True)
    splits = {split: path for name, path in named if (split := _split(name))}
    if len(splits) > 1:
        split, path = max(splits.items())
        one = f"'{path.parent}/{split}-*.parquet'" if path.name.startswith(split) else path.parent
        raise DataError(
            f"{where} has parquet files of the splits {' and '.join(sorted(splits))}: name those of one, such as {one}"
        )
    return paths


def _split(name: str) -> str | None:
    """Return the split that a file's name, or else the nearest of its folders, begins with; None if there is none.

    Examples: train-00.parquet, train/00.parquet and split=train/00.parquet.
    """
    found = (SPLIT.match(part.removeprefix("split=")) for part in reversed(name.split("/")))
    return next((match[1] for match in found if match), None)
