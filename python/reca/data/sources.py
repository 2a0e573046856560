"""Where samples come from, by the text that a recipe names them with."""

import re
from collections.abc import Iterable
from pathlib import Path

from reca.data.config import DataConfig
from reca.data.conversations import Conversations
from reca.data.errors import DataError
from reca.data.folder import Folder
from reca.data.sample import Source
from reca.data.spec import call_source, parse_spec
from reca.data.tars import Tars, expand

DATA_KEYS = {"reca": "images", "i2t": "conversations", "t2i": "captions"}  # task -> key of its samples
TAR = re.compile(r"\.tar($|[.*?\[{])|\.(tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def open_sources(config: DataConfig, tasks: Iterable[str]) -> dict[str, Source]:
    """Open the samples of each task. Raises DataError when a source is missing or empty."""
    sources = {}
    for task in tasks:
        text = getattr(config, DATA_KEYS[task])
        if text is None:
            raise DataError(
                f"objective.{task}.weight is above 0 but data.{DATA_KEYS[task]} is null; say where its samples are"
            )
        sources[task] = open_source(text, task, config.image_root)
    return sources


def open_source(text: str, task: str, image_root: str | None = None) -> Source:
    """Open the source that a recipe's text describes: a folder, tars, a conversations file, or an importable spec.

    task: with "t2i" every sample must have a caption, with "i2t" a conversation.
    Raises DataError when there is nothing to read, and when it is not clear what belongs together.
    """
    if parse_spec(text):
        return call_source(text, task, f"data.{DATA_KEYS[task]}")
    if "\0" in text or not text.strip():
        raise DataError(f"{text!r} is no path; name the data, or null for none")
    path = Path(text)
    try:
        if task == "i2t":
            return Conversations(path, image_root)
        if not path.is_dir() and TAR.search(path.name):
            return Tars(expand(text), task)
        return Folder(path, task)
    except OSError as error:  # of a folder above it that may not be looked into, say
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
