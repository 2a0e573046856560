"""The lock of a run's folder: a file on which every process of the run holds one byte.

POSIX record locks work across the machines of a shared file system, and never against the process itself.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("reca")

FILE = ".lock"
HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)  # what locking fails with where another process has the lock
TIMEOUT = 2.0  # seconds in which a process that was killed lets go of its lock
LEASE = 120.0  # seconds in which a server lets go of the locks of a machine that is gone: NFSv4 has a lease of 90

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
    """Lock some bytes; False when another process has them.

    Waits LEASE seconds where the owner of the file is no process of this machine: it may be gone with its machine.
    """
    began, warned = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            if error.errno not in HELD_BY_OTHERS:
                log.warning("the run folder cannot be locked (%s): start no second process on it", error.strerror)
                return True
            waited = time.monotonic() - began
            if waited > (TIMEOUT if _is_alive_here(owner(handle)) else LEASE):
                return False
            if waited > TIMEOUT and not warned:
                warned = True
                log.warning(
                    "the run folder is in use by %s: waiting up to %.0f s, in which a file system lets go of the locks "
                    "of a machine that is gone", owner(handle) or "another process", LEASE,
                )  # fmt: skip
            time.sleep(0.05)


def write_owner(handle: int) -> None:
    """Write into a lock file who has it."""
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.fsync(handle)  # other machines compare it


def owner(handle: int) -> str:
    """Read who has a lock file, or had it; empty where nobody has written that."""
    return os.pread(handle, 200, 0).decode(errors="replace").strip()


def _is_alive_here(owner: str) -> bool:
    found = re.fullmatch(r"process (\d+) on (.*)", owner)
    return found is not None and found[2] == socket.gethostname() and is_alive(int(found[1]))


def is_alive(process: int) -> bool:
    """Tell whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


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
        write_owner(handle)
        yield
    finally:
        os.close(handle)
