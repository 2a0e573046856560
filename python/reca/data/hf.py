"""Hugging Face `datasets`: of the hub, or of a folder that `save_to_disk` has written."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from reca.data.columns import cell_of, choose, make_sample
from reca.data.config import ColumnsConfig
from reca.data.errors import DataError
from reca.data.folder import total_size
from reca.data.parquet import form_of
from reca.data.sample import Sample, digest

PREFIX = "hf:"
OPTIONS = ("split", "name", "revision")


class Hub(NamedTuple):
    """The parts of hf:PATH?split=SPLIT&name=CONFIGURATION&revision=COMMIT."""

    path: str
    options: dict[str, str]


class HuggingFace:
    """Rows of a data set of `datasets`, which lie in memory-mapped Arrow files: a row is read by itself.

    A sample's key is SPLIT:ROW, rows counted from 0.
    """

    def __init__(self, dataset: Any, task: str, columns: ColumnsConfig, where: str, root: Path):
        self.task, self.root, self.split = task, root, str(dataset.split or "row")
        self.files = [file["filename"] for file in dataset.cache_files]
        forms = {field.name: form_of(field.type) for field in dataset.features.arrow_schema}
        self.columns = choose(forms, task, columns, where)
        names = [name for name in self.columns if name is not None]
        # Cells as they are stored, in whatever format the data set was saved: the views are made by this package.
        self.rows = dataset.select_columns(names).with_format("arrow")
        if not len(self.rows):
            raise DataError(f"{where} holds no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image, text = (name and cell_of(row.column(name), 0, name) for name in self.columns)
        return make_sample(self.key(index), image, text, self.task, self.root)

    def key(self, index: int) -> str:
        return f"{self.split}:{index}"

    def size(self, index: int) -> int:
        """Bytes of all files of the data set: one that is written again has others."""
        return total_size(self.files)

    def identity(self) -> str:
        sizes = [(os.path.basename(file), total_size([file])) for file in self.files]
        return digest([len(self), tuple(self.columns), str(self.rows.features), sizes])


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` has written the folder; False where that cannot be seen."""
    one, *both = (os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json", "dataset_info.json"))
    return one or all(both)


def open_saved(folder: Path, task: str, columns: ColumnsConfig, image_root: str | None) -> HuggingFace:
    """Open a folder that `save_to_disk` has written. Raises DataError."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds for folders that are not whole
        raise DataError(f"{folder} cannot be opened by datasets: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = _one(found, f"{folder} holds the splits {{splits}}: give one of them, such as {folder}/{{first}}")
    return HuggingFace(found, task, columns, str(folder), Path(image_root or folder))


def open_hub(text: str, task: str, columns: ColumnsConfig, image_root: str | None) -> HuggingFace:
    """Open hf:NAME?split=train, downloading what is not there yet. Raises DataError."""
    hub, datasets = _parse(text), _datasets()
    options = {key: value for key, value in hub.options.items() if key != "name"}
    try:
        found = datasets.load_dataset(hub.path, hub.options.get("name"), **options)
    except Exception as error:  # of the network, of the hub, and of files
        raise DataError(f"{text} cannot be loaded by datasets: {type(error).__name__}: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = _one(found, f"{text} has the splits {{splits}}: name one, such as {PREFIX}{hub.path}?split={{first}}")
    return HuggingFace(found, task, columns, text, Path(image_root or "."))


def _parse(text: str) -> Hub:
    path, _, query = text.removeprefix(PREFIX).partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    except ValueError:
        options = {query: ""}
    if "streaming" in options:
        raise DataError(
            f"{text}: a stream has neither a length nor numbered rows, so a run could not shuffle it, share it among "
            "ranks, or continue where it stopped. Read the same files without downloading them first, by row groups: "
            f"hf://datasets/{path or 'OWNER/NAME'}/**/*.parquet (needs pip install 'reca[remote]')"
        )
    if not path or not all(key in OPTIONS and value for key, value in options.items()):
        raise DataError(f"{text} is not understood; write {PREFIX}NAME?split=train, with name= and revision= if needed")
    return Hub(path, options)


def _one(splits: Any, message: str) -> Any:
    if len(splits) != 1:
        raise DataError(message.format(splits=", ".join(splits), first=next(iter(splits), "train")))
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
