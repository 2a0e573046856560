"""The lock of a run's folder: a file on which every process of the run holds one byte.

POSIX record locks work across the machines of a shared file system, and never against the process itself.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("reca")

FILE = ".lock"
HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)  # what locking fails with where another process has the lock
TIMEOUT = 2.0  # seconds in which a process that was killed lets go of its lock

# Who in this process holds a lock file, by what `key` answers. A process has no lock against itself, and loses the one
# it has as soon as it closes the lock file, however often that is open: it must not be opened where it is held.
holders: dict[tuple[int, int, int], Any] = {}


def key(file: int | Path) -> tuple[int, int, int]:
    """Identify a lock file, by whatever path, in this process: a fork has none of its parent's locks."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, os.getpid()


def is_locked(run_dir: Path) -> bool | None:
    """Tell whether some process uses the folder; None where the file system has no locks."""
    path = run_dir / FILE
    try:
        if key(path) in holders:
            return True
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in HELD_BY_OTHERS else None
    finally:
        os.close(handle)
    return False


def acquire(handle: int, start: int, length: int) -> bool:
    """Lock some bytes; False when another process has them."""
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            if error.errno not in HELD_BY_OTHERS:
                log.warning("the run folder cannot be locked (%s): start no second process on it", error.strerror)
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, for what only one process may do at a time; wait while another one has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        waits = False
        while not acquire(handle, 0, 0):
            if not waits:
                log.warning("%s is in the hands of another process: waiting for it to end", what)
            waits = True
        yield
    finally:
        os.close(handle)
