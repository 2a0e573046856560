"""Files of web servers by fsspec, with the errors that it takes for files that are not there."""

from typing import Any

from fsspec.implementations.http import HTTPFileSystem

MISSING = (404, 410)  # answers that say so


class WebFiles(HTTPFileSystem):
    """A web server's files. One that is busy, broken or out of reach raises, as no file that is missing does."""

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
        except OSError as error:  # walks take it for an empty folder
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
