"""Samples, and the interface of their sources."""

import contextlib
import errno
import hashlib
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from reca.data.errors import BadSample, DataError
from reca.data.text import decode_text, one_line

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .gif .tif .tiff .avif".split())
# Image formats that are not supported. Such files are counted and reported, so that none is skipped silently.
OTHER_IMAGE_SUFFIXES = frozenset(
    ".heic .heif .jxl .jp2 .j2k .jpf .jpx .psd .svg .ico .tga .ppm .pgm .pbm .pnm .qoi .dds .exr .hdr .eps .raw .cr2 "
    ".cr3 .nef .arw .orf .raf .rw2 .dng".split()
)
HIDDEN = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})  # system folders: copies, thumbnails, the recycle bin
MAX_IMAGE_BYTES = 2**28
MAX_CAPTION_BYTES = 2**20
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # not caused by the file that is read
INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # Unicode categories: control, format, separators


class Sample(NamedTuple):
    key: str  # identifies the sample, as in the list of bad samples
    image: bytes
    text: Any  # None, a caption, several Captions, a list of Turn, or Scored


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read a sample. Several threads may call it at a time. Raises OSError, BadSample and Outage."""
        ...

    def key(self, index: int) -> str:
        """Return the sample's key, which does not depend on the location of the data. Reads no file."""
        ...

    def size(self, index: int) -> int:
        """Return the size of image and caption in bytes, without reading them; -1 if a file is missing."""
        ...

    def identity(self) -> str:
        """Return a hash of all samples in order, which does not depend on the location of the data."""
        ...


@contextlib.contextmanager
def sample_errors(source: Source, index: int, where: str = "") -> Iterator[None]:
    """Convert the errors of reading a sample: to BadSample if its files cause them, else to DataError with its key.

    where: appended to the key.
    """
    try:
        yield
    except (BadSample, DataError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno not in OF_THE_MACHINE:
            raise BadSample(reason) from error
        raise DataError(f"sample {one_line(source.key(index))}{where}: {reason}") from error


def checked_sample(found: Any) -> Sample:
    """Return what a source has returned. Raises TypeError if it is not a Sample with the bytes of an image."""
    if isinstance(found, Sample) and isinstance(found.image, bytes):
        return found
    kind = f"an image of type {type(found.image).__name__}" if isinstance(found, Sample) else type(found).__name__
    raise TypeError(
        f"a source returns reca.data.sample.Sample(key, image, text), with the bytes of an image file; got {kind}"
    )


def digest(parts: Iterable[Any]) -> str:
    """Return the SHA-256 of the repr of all parts, as hex."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name (without its parents) is hidden or made by the system."""
    return name.startswith(".") or name in HIDDEN


def suffix_of(name: str) -> str:
    """Return the suffix of a file name with its dot, in lower case."""
    return posixpath.splitext(name)[1].lower()


def checked_size(size: int, limit: int, what: str) -> int:
    """Return the size of an image or caption. Raises BadSample when it exceeds the limit."""
    if size > limit:
        raise BadSample(f"the {what} has {size} bytes; at most {limit} are read")
    return size


def decode_caption(data: bytes) -> str:
    """Decode a caption. Raises BadSample if the bytes are not text or the caption is empty."""
    try:
        text = decode_text(data).strip()
    except ValueError as error:
        raise BadSample(f"caption: {error}") from error
    if not any(unicodedata.category(c) not in INVISIBLE for c in text):
        raise BadSample("the caption is empty" + " except for invisible characters" * bool(text))
    return text
