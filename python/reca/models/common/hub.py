"""Locate published files: a local path, or the Hugging Face hub."""

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reca import catalog, units
from reca.io.folders import run_of
from reca.io.paths import exists, is_dir

TOKENIZER = ["*.json", "*.txt", "*.model"]  # patterns of tokenizer files; match no weights


def fetch(source: str, patterns: list[str] | None = None, key: str = "model.weights") -> Path:
    """Return the local folder or file of a path, a hub id (owner/name) or a file on the hub (owner/name/file).

    Downloads are cached. patterns: glob patterns of the files to download; None downloads all. key: the recipe key of
    `source`, for error messages. Raises ValueError if it cannot be found, with the download command for a hub id, or
    if it is a run.
    """
    if path := _local(source, key):
        return path
    repository, file = hub_name(source, key)
    from huggingface_hub import hf_hub_download, snapshot_download

    with _asking(repository, file, patterns, key):
        if file:
            return Path(hf_hub_download(repository, file))
        return Path(snapshot_download(repository, allow_patterns=patterns))


def fetch_tokenizer(
    config: Any, downloads: Mapping[str, list[str]], local: bool = False, part: str = "weights"
) -> Path | None:
    """Return the folder of model.tokenizer or, if it is null, of the part of the model that it is published with.

    Returns None if both are null. Of a hub repository only the tokenizer's files are downloaded. local: nothing is
    downloaded. downloads: the model's DOWNLOADS. Raises ValueError as `fetch`.
    """
    key = "tokenizer" if config.tokenizer else part
    source = getattr(config, key)
    if source is None:
        return None
    if path := _local(source, f"model.{key}"):
        return beside(path)
    repository, file = hub_name(source, f"model.{key}")
    from huggingface_hub import snapshot_download

    with _asking(repository, file, downloads[key], f"model.{key}", local):
        folder = snapshot_download(repository, allow_patterns=TOKENIZER, local_files_only=local)
    return Path(folder, file).parent if file else Path(folder)


def _local(source: str, key: str) -> Path | None:
    """Return the path that `source` is; None if it does not exist. Raises ValueError for a run and its checkpoints."""
    if not exists(path := Path(source).expanduser()):
        return None
    if run := run_of(path):
        raise ValueError(
            f"{key}={source} belongs to the run {run}, which is no published model: name the run in place of the "
            "recipe, train on from it with train.init_from, or name its export"
        )
    return path


@contextlib.contextmanager
def _asking(repository: str, file: str, patterns: list[str] | None, key: str, local: bool = False) -> Iterator[None]:
    """Turn the errors of a download into a ValueError that names the command for it. local: the hub is not asked."""
    library = logging.getLogger("huggingface_hub")
    level = library.level
    library.setLevel(logging.ERROR)  # it warns at every attempt to reach the hub
    try:
        yield
    except Exception as error:  # its HTTP library, whose errors pass through, depends on the version
        cause = "is not asked for it here" if local else cause_of(error)
        raise ValueError(_wanted(repository, file, patterns, key, cause)) from error
    finally:
        library.setLevel(level)


def hub_name(source: str, key: str) -> tuple[str, str]:
    """Split owner/name or owner/name/file into repository and file ("" if none is given).

    Raises ValueError if `source` is not a hub name and thus a path that does not exist.
    """
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 2 or (len(parts) > 2 and not Path(source).suffix):
        raise ValueError(f"{key}={source} does not exist; give a folder, a file, or a hub id such as owner/name")
    return "/".join(parts[:2]), "/".join(parts[2:])


def beside(source: Path) -> Path:
    """Return `source` if it is a folder, else its parent folder."""
    return source if is_dir(source) else source.parent


def _wanted(repository: str, file: str, patterns: list[str] | None, key: str, cause: str) -> str:
    """Describe in one sentence what is missing, why, how large it is, and how to get it."""
    size = catalog.facts_of(repository, file).size
    what = f"{file} of {repository}" if file else repository
    amount = f", about {units.size(size)}," if size else ""
    name = repository.split("/")[1]
    given = f"{name}/{file}" if file else name
    options = f" {file}" if file else "".join(f" --include '{pattern}'" for pattern in patterns or ())
    return (
        f"{key}: {what}{amount} is not on this machine, and the hub {cause}; get it elsewhere with "
        f"`hf download {repository}{options} --local-dir {name}`, copy the folder here and set {key}={given}"
    )


def with_causes(error: BaseException) -> list[BaseException]:
    """List an error and its causes."""
    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < 8:
        chain.append(chain[-1].__cause__)
    return chain


def cause_of(error: Exception) -> str:
    """Summarise why a hub request failed, as a predicate of "the hub"."""
    from huggingface_hub import errors

    chain = with_causes(error)
    for one in chain:
        if isinstance(one, errors.GatedRepoError):
            return "requires its terms to be accepted (do so on its page, then `hf auth login`)"
        if isinstance(one, errors.RepositoryNotFoundError):
            return "has no such repository, or you lack access to it (`hf auth login`)"
        if isinstance(one, errors.EntryNotFoundError) and not isinstance(one, errors.LocalEntryNotFoundError):
            return "has no such file in this repository"
        if isinstance(one, errors.OfflineModeIsEnabled):
            return "is disabled (HF_HUB_OFFLINE)"
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return "could not be downloaded from: the disk of its cache is full (HF_HOME moves the cache)"
        if isinstance(one, OSError) and one.filename is not None:
            return f"could not be downloaded from: {one.filename}: {one.strerror} (HF_HOME moves the cache)"
        if (response := getattr(one, "response", None)) is not None:
            return f"answered with status {response.status_code}; try again later"
    return f"cannot be reached ({type(chain[-1]).__name__})"
