"""fsspec's HTTP file system, without its habit of reporting server errors as missing files."""

import functools
import io
import re
from typing import Any

from aiohttp import ClientTimeout, TraceConfig, TraceRequestEndParams
from fsspec.config import conf
from fsspec.implementations.http import HTTPFileSystem

from reca.data.errors import NO_RANGES
from reca.data.sources.file_systems import has_proxy

MISSING = (404, 410)  # HTTP status codes of a missing file
CONNECTING = 10.0  # seconds without a connection after which a request has failed
STALLED = 30.0  # seconds without a byte, likewise


class WebFiles(HTTPFileSystem):
    """Files of a web server. FileNotFoundError means that the server reports a file as missing, and nothing else."""

    protocol = ("http", "https")  # which fsspec's own class has since 2025.10

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        try:
            return await super()._info(url, **options)
        except FileNotFoundError as error:
            if error.__cause__ is None or getattr(error.__cause__, "status", None) in MISSING:
                raise
            raise error.__cause__ from None

    async def _ls(self, url: str, detail: bool = True, **options: Any) -> Any:
        try:
            return await super()._ls(url, detail, **options)
        except FileNotFoundError:
            raise
        except OSError as error:  # fsspec's walk would treat it as an empty folder
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


@functools.cache
def web_files() -> WebFiles:
    """Return the file system of all servers, which keeps their connections.

    A request may take any time, such as one for a row group, as long as data arrive. client_kwargs of fsspec's own
    settings override ours.
    """
    timeout, checks = ClientTimeout(total=None, sock_connect=CONNECTING, sock_read=STALLED), TraceConfig()
    checks.on_request_end.append(_check_range)
    given: dict[str, Any] = {}
    for protocol in WebFiles.protocol:
        given |= conf.get(protocol, {}).get("client_kwargs", {})
    # Of a file that the server compresses, no part could be read.
    headers = {"Accept-Encoding": "identity"}
    own = {"timeout": timeout, "trace_configs": [checks], "trust_env": has_proxy(), "headers": headers}
    return WebFiles(cache_type="readahead", client_kwargs=own | given | {"headers": headers | given.get("headers", {})})


async def _check_range(_session: Any, _context: Any, request: TraceRequestEndParams) -> None:
    """Raise OSError if an answer is of other bytes than were asked for, which fsspec does not check.

    The whole file is accepted, as it may be small, if it is not longer than the part; it is not read otherwise.
    """
    asked, answer = request.headers.get("Range", ""), request.response
    sent = answer.headers.get("Content-Range", "")
    wanted, found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked), re.match(r"bytes (\d+)-(\d+)/", sent)
    if answer.status == 200 and wanted:
        first, last = map(int, wanted.groups())
        if first or (answer.content_length or 0) > last + 1:
            answer.close()
            raise io.UnsupportedOperation(f"{request.url}: {NO_RANGES}")
    if answer.status == 206 and wanted and found:
        (first, last), (start, end) = (map(int, match.groups()) for match in (wanted, found))
        if start != first or end > last:
            raise OSError(f"{request.url}: the server sent {sent!r} when asked for {asked!r}")
