"""Index of a tar's members, which accounts for every byte of the file.

The standard library parses the headers, but treats a file truncated after a member, and a damaged header in the middle,
as the end of the archive. So the end is checked here.

wids (of webdataset) also gives random access to tars, but its reader verifies no checksums, supports neither long names
nor links, keeps the last of two members with the same name, and accepts truncated files.
"""

import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from reca.data.errors import NO_RANGES, DataError, Outage
from reca.data.sample import IMAGE_SUFFIXES, hidden, suffix_of
from reca.data.sources import index_files
from reca.data.sources.remote import AnyPath, RemotePath, open_stream, reason_of
from reca.data.sources.skipped import Skipped
from reca.io.files import HEAD, packed, placeholder

MAX_PADDING = 2**20  # zeros after the archive: writers pad to a record, interrupted downloads to the whole file
MAX_LINKS = 10
# Bytes of the header before a member's data that are checked when it is read. The header's checksum covers its first
# byte. A request from byte 0 would not reveal a server that ignores ranges.
HEADER = tarfile.BLOCKSIZE - 1


class Stored(NamedTuple):
    """Location of a member's bytes.

    header: CRC-32 of the HEADER bytes before them, which tells whether the tar still has this member there.
    pieces: of a sparse file, (offset in it, length) of the stored parts, in order.
    """

    offset: int
    size: int
    header: int
    pieces: tuple[tuple[int, int], ...] = ()


class Member(NamedTuple):
    name: str  # without a leading "./"
    stored: Stored


def kept_index(path: AnyPath, skipped: Skipped) -> list[Member]:
    """Return the result of `read_index`; for a large tar from its index file, which is built if missing."""
    try:
        index = index_files.IndexFile([path], "tar")
        if not (index.is_safe and index.is_large):
            return read_index(path, skipped)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_of(error, path)}") from error
    content = index_files.read_json(index)
    if content is None:
        with index.locked():
            content = index_files.read_json(index)
            if content is None:
                own = Skipped()
                members = read_index(path, own)
                content = [[[name, *stored] for name, stored in members], own.counts, own.first]
                index_files.write_json(index, content)
    members, counts, first = content
    skipped.merge(counts, first)
    return [Member(name, Stored(*stored)) for name, *stored in members]


def read_index(path: AnyPath, skipped: Skipped) -> list[Member]:
    """Return all files of a tar in order, with links resolved. Raises DataError if the tar is damaged or truncated."""
    found = list(_headers(path))
    infos = [info for info, _ in found]
    headers = {info.offset_data: header for info, header in found}
    files: dict[str, Stored] = {}
    members = []
    targets = {_clean(info.name): info for info in infos}  # of repeated names, the last
    for info in infos:
        name = _clean(info.name)
        if info.isdir():
            continue
        image = suffix_of(name) in IMAGE_SUFFIXES
        if any(hidden(part) for part in name.split("/") if part not in (".", "..")):
            if image:
                skipped.add("hidden files", f"{path}: {name}")
            continue
        if info.isreg():
            stored: Stored | None = _stored(info, headers)
        elif info.islnk():  # usually to an earlier file
            stored = files.get(_clean(info.linkname)) or _follow(info, targets, headers)
        else:
            stored = _follow(info, targets, headers) if info.issym() else None
        if stored:
            files[name] = stored
            members.append(Member(name, stored))
        elif image:
            skipped.add("image members that are not files, or broken links", f"{path}: {name}")
    return members


def _headers(path: AnyPath) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield every member, and the CRC-32 of the HEADER bytes before its data."""
    try:
        size = path.stat().st_size
        if isinstance(path, RemotePath) and path.info().get("partial") is False:
            raise OSError(f"{path}: {NO_RANGES}")  # a small tar could be indexed, but its members not read
        with open_stream(path) as file:
            yield from _walk(path, file, size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_of(error, path)}") from error


def _walk(path: AnyPath, file, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the file is closed by its owner)
    except (OSError, Outage):
        raise
    except Exception as error:  # tarfile raises many types for other files
        raise DataError(f"{path} is not an uncompressed tar: {_what(file, error)}") from error
    place, last = 0, "its beginning"
    infos = iter(tar)  # not tar.next(), which fails on an empty tar in Python 3.10
    while True:
        try:
            info = next(infos, None)
        except (OSError, Outage):
            raise
        except Exception as error:
            raise DataError(_damage(path, size, place, last, str(error), ended=file.tell() >= size)) from error
        if info is None:
            break
        sparse: Any = info.sparse  # pairs of offset and length, unlike in typeshed
        stored = info.size if sparse is None else sum(length for _, length in sparse)
        if info.isreg() and info.offset_data + stored > size:
            raise DataError(f"{path} is cut off at byte {size}, inside {info.name}: fetch or pack it again")
        if info.size < 0 or tar.offset <= info.offset or any(at < 0 or n < 0 for at, n in sparse or ()):
            raise DataError(_damage(path, size, info.offset, last, "a negative size"))
        place, last = tar.offset, info.name
        file.seek(info.offset_data - HEADER)
        yield info, zlib.crc32(file.read(HEADER))
    _check_end(path, file, size, tar.offset, last)


def _check_end(path: AnyPath, file, size: int, place: int, last: str) -> None:
    """Raise DataError unless the archive ends with a block of zeros, followed by nothing but zeros.

    The header of a long name, of several blocks, that the file cuts off is an end to tarfile of Python 3.14.
    """
    ended = file.tell() >= size > place + tarfile.BLOCKSIZE
    file.seek(place)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(
            f"{path} is cut off at byte {size}, after {last}: it has no end-of-archive block. Fetch or pack it again"
        )
    if block.strip(b"\0"):
        raise DataError(_damage(path, size, place, last, "a bad header", ended))
    if size - place > MAX_PADDING:
        raise DataError(
            f"{path} ends at byte {place}, after {last}, but the file has {size} bytes, like an interrupted download "
            "or several concatenated tars: fetch or pack it again"
        )
    rest = file.read().lstrip(b"\0")
    if rest:
        raise DataError(
            f"{path} ends at byte {place}, after {last}, but {len(rest)} bytes follow. Tars cannot be concatenated by "
            "cat: name them one by one, or pack them again"
        )


def _damage(path: AnyPath, size: int, place: int, last: str, reason: str, ended: bool = False) -> str:
    """Describe what is wrong with a header. ended: it continued to the end of the file, as that of a long name may."""
    if ended or place >= size:
        return f"{path} is cut off at byte {size}, after {last}: fetch or pack it again"
    return f"{path} is damaged at byte {place}, after {last} ({reason}): fetch or pack it again"


def _what(file, error: Exception) -> str:
    file.seek(0)
    head = file.read(HEAD)
    return f"it {cause}" if (cause := placeholder(head) or packed(head)) else str(error)


def _stored(info: tarfile.TarInfo, headers: dict[int, int]) -> Stored:
    sparse: Any = info.sparse
    return Stored(info.offset_data, info.size, headers[info.offset_data], tuple(sparse or ()))


def _follow(info: tarfile.TarInfo, targets: dict[str, tarfile.TarInfo], headers: dict[int, int]) -> Stored | None:
    """Resolve a link within the tar. Return None if it does not lead to a file."""
    for _ in range(MAX_LINKS):
        name = info.linkname
        if info.issym():
            name = posixpath.join(posixpath.dirname(_clean(info.name)), name)
        target = targets.get(_clean(name))
        if target is None or target.isdir():
            return None
        info = target
        if info.isreg():
            return _stored(info, headers)
    return None


def _clean(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")
