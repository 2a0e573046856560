"""Samples, and the interface of their sources."""

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from reca.data.errors import BadSample
from reca.data.text import decode_text

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .gif .tif .tiff .avif".split())
# Images too, in formats that are not read. They are counted, so that no folder of them shrinks in silence.
OTHER_IMAGE_SUFFIXES = frozenset(
    ".heic .heif .jxl .jp2 .j2k .jpf .jpx .psd .svg .ico .tga .ppm .pgm .pbm .pnm .qoi .dds .exr .hdr .eps .raw .cr2 "
    ".cr3 .nef .arw .orf .raf .rw2 .dng".split()
)
HIDDEN = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})  # folders in which systems keep copies of their own
MAX_IMAGE_BYTES = 2**28
MAX_CAPTION_BYTES = 2**20
INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})  # categories of Unicode: control and format characters, blanks


class Sample(NamedTuple):
    key: str  # names the sample in the bad_samples
    image: bytes
    text: Any  # None, a caption, or a list of Turn


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read a sample. Raises OSError and BadSample."""
        ...

    def key(self, index: int) -> str:
        """Return the sample's name, independent of where its folder lies. Reads no file."""
        ...

    def size(self, index: int) -> int:
        """Return the bytes of image and caption, without reading them; -1 for a missing file."""
        ...

    def identity(self) -> str:
        """Hash the keys and sizes of all samples in order, independent of where the data lie."""
        ...


def digest(parts: Iterable[Any]) -> str:
    """Hash the repr of all parts: SHA-256, as hex."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name (without its parents) holds nothing that a user put there."""
    return name.startswith(".") or name in HIDDEN


def checked_size(size: int, limit: int, what: str) -> int:
    """Return the size of an image or caption. Raises BadSample when it exceeds the limit."""
    if size > limit:
        raise BadSample(f"the {what} has {size} bytes, more than the {limit} that are read")
    return size


def decode_caption(data: bytes) -> str:
    """Decode a caption. Raises BadSample for bytes that are not text, and for an empty text."""
    try:
        text = decode_text(data).strip()
    except ValueError as error:
        raise BadSample(f"caption: {error}") from error
    if not any(unicodedata.category(c) not in INVISIBLE for c in text):
        raise BadSample("the caption is empty" + " but for characters that show nothing" * bool(text))
    return text
