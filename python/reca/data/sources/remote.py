"""Remote files: s3://, gs://, http(s):// and other URLs that fsspec reads."""

import contextlib
import glob
import io
import os
import posixpath
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit

from reca.data.errors import NO_RANGES, DataError, Outage
from reca.data.sample import checked_size
from reca.data.sources.file_systems import own_file_system

ATTEMPTS = 3  # per request
PAUSE = 0.5  # seconds before the second attempt; doubles with each further one
HOSTS = 4  # web hosts that data may have without being a table of URLs, of which some are always gone
REQUESTS = 16  # files that are asked about at a time when sources are opened
BLOCK = 2**20  # bytes per read of a file that is read sequentially
LONGEST = 300  # characters of an error: those of HTTP parsers quote what they received
LOCAL = ("file://", "local://")  # how addresses of local files begin
STATUS: dict[Any, type[OSError]] = {401: PermissionError, 403: PermissionError, 410: FileNotFoundError}  # of HTTP
# Metadata that identify a version of a file.
CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5Hash", "blob_id")


class RemotePath:
    """The subset of pathlib.Path that sources use, for a file at a URL."""

    def __init__(self, fs: Any, path: str):
        self.fs, self.path = fs, path
        self.facts: dict[str, Any] = {}  # what the server reported about the file when it was first asked

    def __str__(self) -> str:
        return self.fs.unstrip_protocol(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "RemotePath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> "RemotePath":
        """Return the file of that name, with URL syntax in the name escaped."""
        return self.listed(quote(name) if self.is_web else name)

    def listed(self, name: str) -> "RemotePath":
        """Return the file of a name listed by the file system. A web server lists names that are already escaped."""
        return RemotePath(self.fs, posixpath.join(self.path, name))

    @property
    def name(self) -> str:
        return posixpath.basename(self.path.partition("?")[0] if self.is_web else self.path)

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.fs, posixpath.dirname(self.path))

    @property
    def is_web(self) -> bool:
        return lists_by_links(self.path)

    def exists(self) -> bool:
        return self._type() is not None

    def is_file(self) -> bool:
        return self._type() == "file"

    def _type(self) -> str | None:
        """Return "file", "directory", or None if missing. fsspec's `exists` and `isfile` would hide other errors."""
        with contextlib.suppress(FileNotFoundError):
            return self.info()["type"]
        return None

    def info(self) -> dict[str, Any]:
        """Return what the server reported about the file when it was first asked."""
        if not self.facts:
            self.facts = self.ask(self.fs.info, self.path)
            if self.facts["type"] == "file":
                self.note(self)
        return self.facts

    def again(self) -> "RemotePath":
        """Return the same file, about which the server is asked again."""
        return RemotePath(self.fs, self.path)

    def stat(self) -> SimpleNamespace:
        size = self.info().get("size")
        if size is None:
            raise OSError(f"{self}: the server does not report the size of the file")
        return SimpleNamespace(st_size=size)

    def version(self) -> tuple[int, list[str] | None]:
        """Return the size, 0 if unknown, and values that identify this version; None if the server reports none."""
        found = self.info()
        tags = [f"{name}={found[name]}" for name in CHANGES if found.get(name)]
        return found.get("size") or 0, tags or None

    def read_range(self, offset: int, size: int) -> bytes:
        if not size:
            return b""  # a range without bytes cannot be asked for: servers answer with the whole file
        data = self.ask(self.fs.cat_file, self.path, start=offset, end=offset + size)
        if offset and len(data) > size:
            raise OSError(f"{self}: {NO_RANGES}")
        if data:
            self.note(self)
        return data[:size]

    def ask(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call a function of the file system, with retries if the network fails.

        A request that has timed out is not made again before its storage answers others: that may take as long.
        Raises OSError if only this request fails, and Outage if its storage, which answered before, does not now.
        """
        attempt, last = 0, False
        while True:
            attempt += 1
            try:
                with _as_oserror(self):
                    answer = function(*arguments, **options)
                self.note()
                return answer
            except (FileNotFoundError, io.UnsupportedOperation):
                raise
            except OSError as error:
                if last:
                    raise
                if attempt < ATTEMPTS and not isinstance(error, (PermissionError, TimeoutError)):
                    time.sleep(PAUSE * 2 ** (attempt - 1))
                    continue
                answers = _still_answers(self, error)
                if answers is False:  # nor if a token has expired
                    raise Outage(f"{self}: {reason_of(error, self)}") from error
                if answers is None or isinstance(error, PermissionError):
                    raise
                last = True

    @property
    def host(self) -> str:
        return urlsplit(str(self)).netloc

    def note(self, *files: "RemotePath") -> None:
        """Note that the host has answered. files: those that it has listed, or sent metadata or a part of."""
        with _lock:
            hosts = _answered.setdefault(self.fs, {})
            known = [*files, *hosts.pop(self.host, ())]
            hosts[self.host] = list(dict.fromkeys(known))[:2]
            if self.is_web and len(hosts) > HOSTS + 1:
                del hosts[next(iter(hosts))]


AnyPath = Path | RemotePath
_lock = threading.Lock()
# The two latest files, if there are any, by file system and by host or bucket that has answered.
_answered: dict[Any, dict[str, list[RemotePath]]] = {}


def _still_answers(failed: RemotePath, error: OSError) -> bool | None:
    """Return whether the storage of a file answers other requests; None if it has answered none so far.

    A byte is asked for of the latest file, if possible another: at its host or bucket, or at any of many web hosts.
    A host of which no file is known only answers if it has refused this one.
    """
    with _lock:
        known = _answered.get(failed.fs, {}).copy()
    if failed.host in known and not (failed.is_web and len(known) > HOSTS):
        files = sorted(known[failed.host], key=lambda path: path == failed)[:1]
        if not files:
            return isinstance(error, PermissionError)
    else:
        files = [paths[0] for paths in reversed(known.values()) if paths][:HOSTS]
    for path in files:
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileNotFoundError, io.UnsupportedOperation), _as_oserror(path):
                path.fs.cat_file(path.path, start=0, end=1)
            return True
    return False if files else None


@contextlib.contextmanager
def _as_oserror(path: RemotePath) -> Iterator[None]:
    """Convert exceptions of network libraries to OSError; those of a late answer to TimeoutError, also if OSErrors."""
    try:
        yield
    except Exception as error:
        said = " ".join(_said(error).split())[:LONGEST]
        reason = ": ".join(filter(None, (type(error).__name__, said)))
        if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
            raise TimeoutError(f"{path}: the server stopped answering ({reason})") from error
        if isinstance(error, OSError):
            raise
        kind = STATUS.get(getattr(error, "status", None), OSError)
        raise kind(f"{path}: {reason}") from error


def _said(error: Exception) -> str:
    """Return the message of an error; of an HTTP answer without the URL, which its file names."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    return str(error) if status is None or message is None else f"{status} {message}"


def reason_of(error: OSError, name: object) -> str:
    """Return why a file cannot be read, without its name, with which the errors of remote files begin."""
    return (error.strerror or str(error)).removeprefix(f"{name}: ")


def is_address(text: str) -> bool:
    """Return whether a text is the address of a remote file. A file:// URL is the path of a local one."""
    return "://" in text and not text.startswith(LOCAL)


def local_name(text: str) -> str:
    """Return the path that a file:// URL stands for; any other text unchanged."""
    return text.partition("://")[2] if text.startswith(LOCAL) else text


def lists_by_links(text: str) -> bool:
    """Return whether the server of a URL lists files, if at all, as a page of links."""
    return text.startswith(("http://", "https://"))


def to_path(text: str) -> AnyPath:
    """Return the path of a local file or a URL. Raises DataError like `remote_path`."""
    return remote_path(text) if is_address(text) else Path(local_name(text))


def remote_path(text: str) -> RemotePath:
    """Return the path of a file at a URL. Raises DataError if fsspec cannot open such URLs."""
    try:
        import fsspec

        if lists_by_links(text):
            from reca.data.sources.web import web_files

            return RemotePath(web_files(), text)
        fs, path = fsspec.core.url_to_fs(text)
        return RemotePath(own_file_system(fs), path)
    except ImportError as error:
        raise DataError(f"{text} needs a package that is not installed: {error}: pip install 'reca[remote]'") from None
    except Exception as error:  # an unknown protocol, missing credentials and more
        raise DataError(f"{text} cannot be opened: {type(error).__name__}: {error}") from error


def read_range(path: AnyPath, offset: int, size: int) -> bytes:
    """Read a range of bytes of a file; fewer if the file ends earlier."""
    if isinstance(path, RemotePath):
        return path.read_range(offset, size)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_whole(path: AnyPath, limit: int, what: str) -> bytes:
    """Read a file of at most `limit` bytes. Raises BadSample for a larger one. what: it is, for the message."""
    if isinstance(path, RemotePath):
        data = path.read_range(0, limit + 1)
        checked_size(len(data), limit, what)
        return data
    with path.open("rb") as file:
        checked_size(os.fstat(file.fileno()).st_size, limit, what)
        return file.read(limit)


class Ranges(io.RawIOBase):
    """Stream of a file at a URL. Each read is a separate range request, retried if the network fails."""

    def __init__(self, path: RemotePath):
        self.path, self.place, self.size = path, 0, path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        left = max(0, self.size - self.place)
        data = self.path.read_range(self.place, len(buffer)) if left else b""
        if left and not data:
            raise OSError(f"{self.path} ends at byte {self.place}; expected {self.size} bytes")
        if len(data) > left:
            raise OSError(f"{self.path}: {NO_RANGES}")
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def open_stream(path: AnyPath) -> BinaryIO:
    """Open a file for sequential reading."""
    if isinstance(path, RemotePath):
        return cast(BinaryIO, io.BufferedReader(Ranges(path), BLOCK))
    return path.open("rb")


def find(names: list[str]) -> tuple[list[RemotePath], list[str]]:
    """Return the files that match URLs or URL patterns, and the names without a match.

    As with local files, a name that exists is no pattern, and patterns match a hidden file only if they name one.
    """
    paths = [remote_path(name) for name in names]

    def found(pair: tuple[str, RemotePath]) -> list[RemotePath]:
        name, path = pair
        if not glob.has_magic(name):
            return [path] if path.exists() else []
        with contextlib.suppress(OSError):  # of a server that refuses such a name
            if path.exists():
                return [path]
        try:
            matches = sorted(path.ask(path.fs.glob, path.path))
            return [RemotePath(path.fs, match) for match in matches if "/." in path.path or "/." not in match]
        except PermissionError:
            if not lists_by_links(name):
                raise
            return []

    with ThreadPoolExecutor(REQUESTS) as pool:
        matches = list(pool.map(found, zip(names, paths, strict=True)))
    missing = [name for name, match in zip(names, matches, strict=True) if not match]
    return list(dict.fromkeys(path for match in matches for path in match)), missing
