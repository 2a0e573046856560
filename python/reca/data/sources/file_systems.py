"""Settings of fsspec's file systems."""

import functools
from typing import Any
from urllib.request import getproxies

CONNECTIONS = 100  # of one process to S3; as many as to web servers


def has_proxy() -> bool:
    """Return whether the environment names a proxy, so that aiohttp should look for it.

    It does so again for every request, which takes half a millisecond. Then it also uses the passwords of ~/.netrc.
    """
    return not getproxies().keys() <= {"no"}


@functools.lru_cache(maxsize=64)
def own_file_system(shared: Any) -> Any:
    """Return a file system like one that fsspec shares with other code, with settings of its own.

    Its searches raise the error of a folder that cannot be listed, which to fsspec would be empty. It makes a request
    once, or twice where botocore does: repetitions are up to `RemotePath.ask`, and would multiply. botocore's own limit
    of ten connections would be one of data.workers.
    """
    options = dict(shared.storage_options)
    if hasattr(shared, "config_kwargs"):  # s3fs
        own = {"retries": {"total_max_attempts": 2}, "max_pool_connections": CONNECTIONS}
        options["config_kwargs"] = own | (options.get("config_kwargs") or {})
    if hasattr(shared, "session_kwargs"):  # gcsfs
        options["session_kwargs"] = {"trust_env": has_proxy()} | (options.get("session_kwargs") or {})
    fs = type(shared)(*shared.storage_args, **options, skip_instance_cache=True)
    for name in ("walk", "_walk"):
        if (walk := getattr(fs, name, None)) is not None:
            setattr(fs, name, functools.partial(walk, on_error=_unless_missing))
    if hasattr(fs, "retries"):  # s3fs
        fs.retries = 1
    if hasattr(fs, "block_size"):  # hf://, which reads 5 MiB more than a range: 0 would be a stream
        fs.block_size = 1
    return fs


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
