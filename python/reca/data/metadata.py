"""Removal of metadata from image files: text, colour profiles, EXIF and previews.

Decoders read metadata first and reject a file whose metadata is too large or corrupt, although its pixels are intact.
"""

import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"})
PNG_ORIENTATION = b"eXIf"
JPEG = b"\xff\xd8"
JPEG_SCAN = 0xDA
JPEG_END = b"\xff\xd9"
JPEG_COLOURS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}  # colour coding: first bytes, minimal length
JPEG_COMMENT = 0xFE


def without_metadata(data: bytes) -> bytes | None:
    """Return the image with only the parts needed to decode it; None for formats other than PNG and JPEG."""
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(JPEG):
        return _jpeg(data)
    return None


def _png(data: bytes) -> bytes:
    """Keep the chunks needed for the pixels, and EXIF (orientation) if intact. A chunk is length, type, data, CRC."""
    parts, place = [PNG], len(PNG)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        sound = kind in PNG_PIXELS
        if kind == PNG_ORIENTATION and end <= len(data):
            (crc,) = struct.unpack_from(">I", data, end - 4)
            sound = zlib.crc32(data[place + 4 : end - 4]) == crc
        if sound:
            parts.append(data[place:end])
        place = end
    return b"".join(parts)


def lacks_end(data: bytes) -> bool:
    """Return whether a JPEG has no end marker after its scan, like a download that left zeros in place of the rest."""
    _, scan = _segments(data)
    return data.find(JPEG_END, scan) < 0


def _jpeg(data: bytes) -> bytes:
    """Keep the segments needed for the pixels, and everything from the scan on."""
    segments, scan = _segments(data)
    return b"".join([JPEG, *(segment for segment in segments if _needed(segment[1], segment[4:]))]) + data[scan:]


def _segments(data: bytes) -> tuple[list[bytes], int]:
    """Return the segments before the scan, and its place. A segment is 0xFF, marker, length with its 2 bytes, data."""
    segments, place = [], len(JPEG)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker == JPEG_SCAN:
            break
        (length,) = struct.unpack_from(">H", data, place + 2)
        segments.append(data[place : place + 2 + length])
        place += 2 + length
    return segments, place


def _needed(marker: int, content: bytes) -> bool:
    if marker in JPEG_COLOURS:
        start, least = JPEG_COLOURS[marker]
        return content.startswith(start) and len(content) >= least
    return not (0xE0 <= marker <= 0xEF or marker == JPEG_COMMENT)
