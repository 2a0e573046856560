"""The lock of a run folder: a file in which every process of the run locks one byte.

POSIX record locks work across the machines of a shared file system, but do not conflict within one process.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("reca")

FILE = ".lock"
HELD_BY_OTHERS = (errno.EACCES, errno.EAGAIN)  # errors of locking while another process holds the lock
TIMEOUT = 2.0  # seconds within which the lock of a killed process is released
POLL = 0.5  # seconds between attempts of `alone`
LEASE = 120.0  # seconds within which a server releases the locks of a dead machine: NFSv4's lease is 90

# Holders of lock files in this process, by `key`. A process's locks do not conflict with each other, and closing any
# handle of a file releases all its locks on that file: a lock file must not be opened while it is held.
holders: dict[tuple[int, int, int], Any] = {}
_threads: dict[tuple[str, int], threading.Lock] = {}  # of `alone`, by path and process


def key(file: int | Path) -> tuple[int, int, int]:
    """Identify a lock file, whatever its path, and this process: a fork does not inherit its parent's locks."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, os.getpid()


def is_locked(run_dir: Path) -> bool | None:
    """Tell whether some process uses the folder; None if the file system has no locks."""
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
    """Lock a range of bytes. Return False if another process holds it.

    Waits up to LEASE seconds if the owner is not a live process of this machine: its machine may have died.
    """
    began, warned = time.monotonic(), False
    while not _try(handle, start, length):
        waited = time.monotonic() - began
        if waited > (TIMEOUT if _is_alive_here(owner(handle)) else LEASE):
            return False
        if waited > TIMEOUT and not warned:
            warned = True
            log.warning(
                "the run folder is in use by %s: waiting up to %.0f s, in case its machine has died and the file "
                "system has yet to release its lock", owner(handle) or "another process", LEASE,
            )  # fmt: skip
        time.sleep(0.05)
    return True


def _try(handle: int, start: int = 0, length: int = 0) -> bool:
    """Lock a range of bytes unless another process holds it. A file system without locks is a warning."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno in HELD_BY_OTHERS:
            return False
        log.warning("the folder cannot be locked (%s): do not start a second process on it", error.strerror)
    return True


def write_owner(handle: int) -> None:
    """Record this process in a lock file as its owner."""
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.fsync(handle)  # so that other machines see it


def owner(handle: int) -> str:
    """Read the current or last owner of a lock file; empty if none is recorded."""
    return os.pread(handle, 200, 0).decode(errors="replace").strip()


def _is_alive_here(owner: str) -> bool:
    found = re.fullmatch(r"process (\d+) on (.*)", owner)
    return found is not None and found[2] == socket.gethostname() and is_alive(int(found[1]))


def is_alive(process: int) -> bool:
    """Tell whether a process of this number exists on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        pass
    return True


@contextlib.contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, for work of one thread at a time. Wait, however long, while another one or process holds it."""
    thread = _threads.setdefault((os.path.realpath(path), os.getpid()), threading.Lock())
    if not thread.acquire(blocking=False):
        log.warning("%s is in use by another thread of this process: waiting for it to end", what)
        thread.acquire()
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try(handle):
                log.warning("%s is in use by %s: waiting for it to end", what, owner(handle) or "another process")
                while not _try(handle):
                    time.sleep(POLL)
            write_owner(handle)
            yield
        finally:
            os.close(handle)
    finally:
        thread.release()
