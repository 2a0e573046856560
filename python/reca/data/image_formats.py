"""Image formats that are read, and what to do about files of others."""

import functools

from PIL import Image, features

from reca.io.files import packed, placeholder

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # those of the suffixes that sources accept
# Brands of files of the format ISO BMFF, which begin with a length of 4 bytes, "ftyp" and the brand.
AVIF = (b"avif", b"avis")
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


@functools.cache
def known_formats() -> list[str]:
    """Return those of FORMATS that the installed Pillow knows; `Image.open` fails for the name of another."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def unidentified(head: bytes) -> str:
    """Explain why Pillow identifies no image in a file that begins with `head`."""
    if cause := placeholder(head) or packed(head):
        return f"the file {cause}"
    reason, brand = f"not an image in a supported format ({', '.join(FORMATS)})", head[8:12]
    if head[4:8] == b"ftyp" and brand in HEIC:
        return f"{reason} but HEIC: convert it to one of these"
    if head[4:8] == b"ftyp" and brand in AVIF and not features.check("avif"):
        return f"{reason} that this Pillow decodes, but AVIF: install Pillow 11.3 or later, or convert it"
    return reason
