"""fsspec's HTTP file system, without its habit of reporting server errors as missing files."""

from typing import Any

from aiohttp import ClientTimeout
from fsspec.implementations.http import HTTPFileSystem

MISSING = (404, 410)  # HTTP status codes of a missing file
STALLED = 60.0  # seconds without a byte after which a request has failed


class WebFiles(HTTPFileSystem):
    """Files of a web server. FileNotFoundError means that the server reports a file as missing, and nothing else."""

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


def web_files() -> WebFiles:
    """Return the file system. A request may take any time, such as one for a row group, as long as data arrive."""
    return WebFiles(client_kwargs={"timeout": ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)})
