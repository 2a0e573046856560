"""Where samples come from. A source maps an index to (key, bytes of an image, text)."""

import re
from pathlib import Path

from reca.data.conversations import Conversations
from reca.data.errors import DataError
from reca.data.folder import Folder
from reca.data.source import Sample, Source
from reca.data.tars import Tars, expand

__all__ = ["DataError", "Sample", "Source", "open_source"]
TAR = re.compile(r"\.tar($|[.*?\[{])|\.(tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def open_source(spec: str, task: str, image_root: str | None = None) -> Source:
    """The source that `spec` describes.

    task: with "t2i" every sample must have a caption, with "i2t" a conversation.
    Raises DataError when there is nothing to read, and when it is not clear what belongs together.
    """
    if spec.startswith("world:"):
        from reca.world.source import world_source

        return world_source(spec.removeprefix("world:"), task)
    if "\0" in spec or not spec.strip():
        raise DataError(f"{spec!r} is no path; name the data, or null for none")
    path = Path(spec).expanduser()
    try:
        if task == "i2t":
            return Conversations(path, image_root)
        if not path.is_dir() and TAR.search(path.name):
            return Tars(expand(spec), task)
        return Folder(path, task)
    except OSError as error:  # of a folder above it that may not be looked into, say
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
