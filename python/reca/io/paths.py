"""Whether a path exists and what it is, as far as the system can tell.

Path.exists, is_file and is_dir of Python 3.14 answer False where a folder above may not be entered or a disk does not
answer. A checkpoint there would be missing, and its run would start from the first step.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Protocol

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)  # of these, Path has always answered False


class RemotePath(Protocol):
    """A path of another machine, whose methods raise by themselves."""

    def exists(self) -> bool: ...

    def is_file(self) -> bool: ...


def exists(path: Path | RemotePath) -> bool:
    """Tell whether a path exists. Raises OSError if the system cannot tell."""
    return _mode(path) is not None if isinstance(path, Path) else path.exists()


def is_file(path: Path | RemotePath) -> bool:
    """Tell whether a path is a regular file. Raises OSError if the system cannot tell."""
    return stat.S_ISREG(_mode(path) or 0) if isinstance(path, Path) else path.is_file()


def is_dir(path: Path) -> bool:
    """Tell whether a path is a folder. Raises OSError if the system cannot tell."""
    return stat.S_ISDIR(_mode(path) or 0)


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except ValueError:  # a NUL character
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
