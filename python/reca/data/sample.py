"""What every source of samples answers."""

import hashlib
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


class Sample(NamedTuple):
    key: str  # names the sample in the bad_samples
    image: bytes
    text: Any  # None, a caption, or a list of Turn


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises OSError and BadSample."""
        ...

    def key(self, index: int) -> str:
        """The sample's name, which does not depend on where its folder lies. Nothing is read for it."""
        ...

    def size(self, index: int) -> int:
        """Bytes of the sample's image and caption, without reading them; -1 for a file that is not there."""
        ...

    def identity(self) -> str:
        """Hex digest over the keys and sizes of all samples in their order, wherever the data lie."""
        ...


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 over the parts' repr, as hex."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()


def hidden(name: str) -> bool:
    """Whether a file or folder of this name (without its parents) holds nothing that a user put there."""
    return name.startswith(".") or name in HIDDEN


def checked_size(size: int, limit: int, what: str) -> int:
    """Raises BadSample when an image or caption is larger than any should be."""
    if size > limit:
        raise BadSample(f"the {what} has {size} bytes, more than the {limit} that are read")
    return size


def decode_caption(data: bytes) -> str:
    """Raises BadSample for bytes that are no text, and for a text without a word."""
    try:
        text = decode_text(data).strip()
    except ValueError as error:
        raise BadSample(f"caption: {error}") from error
    if not text:
        raise BadSample("the caption is empty")
    return text
