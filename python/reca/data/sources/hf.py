"""Hugging Face datasets, from the hub or from a folder written by `save_to_disk`."""

import itertools
import os
from collections.abc import Iterator, Set
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from reca.data.config import ColumnsConfig
from reca.data.errors import BadSample, DataError
from reca.data.sample import Sample, digest
from reca.data.sources.columns import choose, is_json, make_sample
from reca.data.sources.folder import total_size
from reca.data.sources.parquet import form_of
from reca.data.sources.remote import AnyPath, to_path

PREFIX = "hf:"
OPTIONS = ("split", "name", "revision")


class Hub(NamedTuple):
    """The parts of hf:PATH?split=SPLIT&name=CONFIGURATION&revision=COMMIT."""

    path: str
    options: dict[str, str]


class HuggingFace:
    """Rows of a Hugging Face dataset in memory-mapped Arrow files, read one at a time.

    A sample's key is SPLIT:ROW, with rows counted from 0.
    """

    def __init__(self, dataset: Any, task: str, columns: ColumnsConfig, where: str, root: AnyPath):
        self.task, self.root, self.split = task, root, str(dataset.split or "row")
        self.files = [file["filename"] for file in dataset.cache_files]
        forms = {field.name: form_of(field.type) for field in dataset.features.arrow_schema}
        self.columns = choose(forms, task, columns, where)
        # Stored cells, whatever format the dataset was saved with: this package decodes them.
        self.rows = dataset.select_columns(self.columns.names).with_format("arrow")
        if not len(self.rows):
            raise DataError(f"{where} has no rows")
        self.images = len(self.rows)  # distinct ones: no two have the same key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        try:
            for column in row.columns:
                for chunk in column.chunks:
                    _validate(chunk)
        except ValueError as error:
            raise BadSample(f"the row is damaged: {error}") from error
        return make_sample(self.key(index), row, 0, self.columns, self.task, self.root)

    def key(self, index: int) -> str:
        return f"{self.split}:{index}"

    def indices_of(self, keys: Set[str]) -> list[int]:
        """Return the indices of the samples with these keys."""
        numbers = (int(row) for row in (key.rpartition(":")[2] for key in keys) if row.isdecimal())
        return [number for number in set(numbers) if number < len(self) and self.key(number) in keys]

    def size(self, index: int) -> int:
        """Return the bytes of all files of the dataset, which change when it is rewritten; -1 if one is missing."""
        return total_size(self.files)

    def identity(self) -> str:
        sizes = [(os.path.basename(file), total_size([file])) for file in self.files]
        columns = [self.rows.data.column(name) for name in self.columns.names]
        # Arrow pads its buffers, so files of other rows may have the same size.
        lengths = (part for column in columns for chunk in column.chunks for part in _lengths(chunk))
        return digest(itertools.chain([len(self), tuple(self.columns), str(self.rows.features), sizes], lengths))


def _lengths(array: Any) -> Iterator[bytes]:
    """Yield the lengths of the texts, bytes and lists in an Arrow array, which are stored apart from their contents."""
    import pyarrow.compute as compute
    from pyarrow import types

    if is_json(array.type):
        array = array.storage
    kind = array.type
    if types.is_struct(kind):
        for part in array.flatten():
            yield from _lengths(part)
    elif types.is_list(kind) or types.is_large_list(kind):
        yield compute.list_value_length(array).fill_null(-1).to_numpy().tobytes()
        offsets = array.offsets.to_numpy()
        # Flattening follows them, and Arrow aborts the process for one that is damaged: then only its row is bad.
        if (offsets[1:] >= offsets[:-1]).all() and 0 <= offsets[0] <= offsets[-1] <= len(array.values):
            yield from _lengths(array.flatten())
    elif any(test(kind) for test in (types.is_binary, types.is_string, types.is_large_binary, types.is_large_string)):
        yield compute.binary_length(array).fill_null(-1).to_numpy().tobytes()


def _validate(array: Any) -> None:
    """Raise ValueError if offsets in an Arrow array are damaged, which reading it would follow to any address.

    Arrow's own full validation of a nested array checks all rows of its chunk.
    """
    import pyarrow
    from pyarrow import types

    if is_json(array.type):
        array = array.storage
    if types.is_struct(array.type):
        array.validate()
        for part in array.flatten():
            _validate(part)
    elif types.is_list(array.type) or types.is_large_list(array.type):
        array.validate()
        _validate(array.flatten())
    elif types.is_string(array.type):  # text that is not UTF-8 is reported with its column
        array.view(pyarrow.binary()).validate(full=True)
    else:
        array.validate(full=True)


def is_saved(folder: Path) -> bool:
    """Return whether the folder was written by `save_to_disk`; False if it is not accessible."""
    one, *both = (os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json", "dataset_info.json"))
    return one or all(both)


def open_saved(folder: Path, task: str, columns: ColumnsConfig, image_root: str | None) -> HuggingFace:
    """Open a folder written by `save_to_disk`. Raises DataError."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many types, if files are missing or damaged
        raise DataError(f"{folder} cannot be opened by datasets: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = _one(found, str(folder), f"{folder}/")
    return HuggingFace(found, task, columns, str(folder), to_path(image_root or str(folder)))


def open_hub(text: str, task: str, columns: ColumnsConfig, image_root: str | None) -> HuggingFace:
    """Open hf:NAME?split=train; download files that are not cached. Raises DataError.

    Without image_root, paths in cells are absolute: of files that `datasets` has downloaded, as for a folder of images.
    """
    hub, datasets = _parse(text), _datasets()
    options = {key: value for key, value in hub.options.items() if key != "name"}
    try:
        found = datasets.load_dataset(hub.path, hub.options.get("name"), **options)
    except Exception as error:  # from the network, the hub or files
        raise DataError(f"{text} cannot be loaded by datasets: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = _one(found, text, f"{PREFIX}{hub.path}?split=")
    return HuggingFace(found, task, columns, text, to_path(image_root or "/"))


def _parse(text: str) -> Hub:
    path, _, query = text.removeprefix(PREFIX).partition("?")
    try:
        literal = query.replace("+", "%2B")  # split=train+test, which would be read as a space
        options = dict(parse_qsl(literal, keep_blank_values=True, strict_parsing=True)) if query else {}
    except ValueError:
        options = {query: ""}
    if "streaming" in options:
        raise DataError(
            f"{text}: a stream has neither a length nor random access, so a run could not shuffle it, shard it over "
            "ranks or resume. To read the same files by row groups without downloading them first, write "
            f"hf://datasets/{path or 'OWNER/NAME'}/**/*.parquet (needs pip install 'reca[remote]')"
        )
    if not path or not all(key in OPTIONS and value for key, value in options.items()):
        raise DataError(f"{text} is not valid; write {PREFIX}NAME?split=train, with name= and revision= if needed")
    return Hub(path, options)


def _one(splits: Any, where: str, start: str) -> Any:
    """Return the only split. Raises DataError if there are others. start: of the name of a split, for the message."""
    if len(splits) != 1:
        first = next(iter(splits), "train")
        raise DataError(f"{where} has the splits {', '.join(splits)}: name one of them, such as {start}{first}")
    return next(iter(splits.values()))


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"this data needs Hugging Face datasets, which cannot be imported ({error}): pip install 'reca[hf]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets
