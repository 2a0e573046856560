"""Opening of the sources that a recipe names."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from reca.data.batch import task_rng
from reca.data.config import ColumnsConfig, DataConfig
from reca.data.errors import DataError
from reca.data.sample import Source
from reca.data.sources import hf
from reca.data.sources.conversations import Conversations
from reca.data.sources.folder import UNREADABLE, Folder, NoImages, list_files
from reca.data.sources.mixture import Mixture, limit
from reca.data.sources.parquet import Parquet, one_split
from reca.data.sources.patterns import expand
from reca.data.sources.remote import AnyPath, is_address, local_name, reason_of, remote_path, to_path
from reca.data.sources.remote_folder import RemoteFolder, list_remote
from reca.data.sources.scored import ScoredImages
from reca.data.sources.skipped import Skipped, log_once
from reca.data.sources.tars import Tars
from reca.data.spec import call_source, parse_spec
from reca.io.paths import is_dir

DATA_KEYS = {
    "reca": "images",
    "i2t": "conversations",
    "t2i": "captions",
    "srum": "scored",
}  # task -> key of its samples
TAR = re.compile(r"\.tar($|[.*?\[{])|\.(tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
JSON = re.compile(r"\.(json|jsonl|ndjson)$", re.IGNORECASE)
UNCOMMITTED = "_temporary"  # folder of Spark
TABLE_LOG = re.compile(r"(?:^|/)(?:_delta_log/[^/]+|metadata/[^/]+\.metadata)\.json$")  # of Delta, and of Iceberg
PARQUET = re.compile(r"\.(parquet|pq)($|[.*?\[{])", re.IGNORECASE)


def open_sources(config: DataConfig, tasks: Iterable[str], seed: int = 0) -> dict[str, Source]:
    """Open the source of each task. Raises DataError if one is missing or empty.

    seed: seed of the run, which selects the samples of data.limit.
    """
    sources = {}
    for task in tasks:
        wanted = getattr(config, DATA_KEYS[task])
        if wanted is None:
            raise DataError(
                f"objective.{task}.weight is above 0 but data.{DATA_KEYS[task]} is null; set it, or the weight to 0"
            )
        names = [wanted] if isinstance(wanted, str) else [item["source"] for item in wanted]
        parts = [open_source(name, task, config.image_root, config.columns) for name in names]
        source = parts[0] if isinstance(wanted, str) else Mixture(parts, [item["weight"] for item in wanted], names)
        if config.limit is not None:
            source = limit(source, config.limit, task_rng(seed, task, 2).seed, config.shuffle)
        if isinstance(source, Mixture):
            log_once(logging.INFO, f"data.{DATA_KEYS[task]}: {source.describe(names)}")
        sources[task] = source
    return sources


def open_source(text: str, task: str, image_root: str | None = None, columns: ColumnsConfig | None = None) -> Source:
    """Open the source that a recipe names: a folder, files or a pattern, a dataset of the hub, or an importable spec.

    task: "t2i" requires a caption per sample, "i2t" a conversation, "srum" a file of scored images.
    columns: columns of tables.
    Raises DataError if there is nothing to read, or if it is ambiguous which files belong together.
    """
    text = local_name(text)
    path, columns = Path(text), columns or ColumnsConfig()
    if text.startswith(hf.PREFIX) and not is_address(text):
        return hf.open_hub(text, task, columns, image_root)
    if spec := parse_spec(text):
        return call_source(spec, task, f"data.{DATA_KEYS[task]}")
    if "\0" in text or not text.strip():
        raise DataError(f"{text!r} is not a path; name the data, or null for none")
    try:
        if is_address(text):
            remote_path(text).fs.invalidate_cache()  # listings from earlier in this process
        if task == "srum":
            return ScoredImages(to_path(text), image_root)
        if is_address(text):
            return _open_address(text, task, image_root, columns)
        if is_dir(path):
            return _open_folder(path, task, image_root, columns)
        if PARQUET.search(path.name):
            return Parquet(one_split(expand(text, "parquet"), text), task, columns, image_root)
        if task == "i2t":
            return Conversations(path, image_root)
        return Tars(expand(text), task) if TAR.search(path.name) else Folder(path, task)
    except OSError as error:  # such as a parent folder without permission
        raise DataError(f"{error.filename or text} cannot be read: {reason_of(error, text)}") from error


def _open_folder(path: Path, task: str, image_root: str | None, columns: ColumnsConfig) -> Source:
    """Open a folder: one saved by `datasets`, one of images, or one of parquet files if it has no images."""
    if hf.is_saved(path):
        return hf.open_saved(path, task, columns, image_root)
    if task == "i2t":
        skipped = Skipped()
        files: Mapping[str, Sequence[str]] = list_files(path, skipped)
        if ".parquet" not in files:
            return Conversations(path, image_root)  # raises the error for a folder
    else:
        try:
            return Folder(path, task)
        except NoImages as error:
            files, skipped = error.files, error.skipped
            if not _is_of_tables(files):
                raise
    skipped.only(UNREADABLE).warn(str(path))
    tables = [path / name for name in _tables(path, files)]
    return Parquet(one_split(sorted(tables), path), task, columns, image_root)


def _open_address(text: str, task: str, image_root: str | None, columns: ColumnsConfig) -> Source:
    """Open tars, parquet files, conversations or a folder at a URL."""
    name, root = text.rpartition("/")[2], remote_path(text)
    if PARQUET.search(name):
        return Parquet(one_split(expand(text, "parquet"), text), task, columns, image_root)
    if task == "i2t" and JSON.search(root.name):
        return Conversations(root, image_root)
    if task != "i2t" and TAR.search(name):
        return Tars(expand(text), task)
    files: Mapping[str, Sequence[str]]
    if task == "i2t":
        files = list_remote(root, Skipped())[1]
        if ".parquet" not in files:
            raise DataError(f"{text} has no parquet files; for conversations in JSON, name the .json or .jsonl file")
    else:
        try:
            return RemoteFolder(root, task)
        except NoImages as error:
            files = error.files
            if not _is_of_tables(files):
                raise
    tables = [root.listed(name) for name in _tables(root, files)]
    return Parquet(one_split(sorted(tables), root), task, columns, image_root)


def _is_of_tables(files: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a folder without images is one of parquet files. Those beside tars may be metadata of the tars."""
    return ".parquet" in files and ".tar" not in files


def _tables(folder: AnyPath, files: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the parquet files of a folder, without those that Spark has not committed.

    Raises DataError if none is left, or if a log says which are current: others may hold rows that were deleted.
    """
    if log := next(filter(TABLE_LOG.search, files.get(".json", ())), None):
        raise DataError(
            f"{folder} is a table of Delta or Iceberg, by {log}: its folder may have rows that were replaced or "
            "deleted. Write its current version as plain parquet files, or name the files as FOLDER/*.parquet"
        )
    found = [name for name in files[".parquet"] if UNCOMMITTED not in name.split("/")]
    if not found:
        raise DataError(f"{folder} has only parquet files that Spark has not committed, in {UNCOMMITTED}")
    return found
