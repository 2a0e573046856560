"""What a run is doing, for people and for batch scripts: run_dir/status.json, and the lock of who uses the folder.

{"state": "interrupted", "update": 125, "updates": 200, "checkpoint": "checkpoints/000125", "exit_code": 75, ...}
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from reca import distributed, exits
from reca.folders import PART, replace_text

log = logging.getLogger("reca")

FILE, LOCK = "status.json", ".lock"
STATES = ("running", "interrupted", "failed", "finished")
PATIENCE = 2.0  # seconds in which a process that was killed lets go of its lock


class RunInUse(RuntimeError):
    """Another process uses this run folder."""

    exit_code = exits.IN_USE


@dataclass
class Status:
    """The contents of status.json.

    state         running, interrupted (saved: the same command continues), failed, or finished
    update        updates whose result is in the checkpoint
    updates       updates that the run is to make
    checkpoint    newest complete checkpoint, relative to the run folder; null if there is none
    exit_code     that of the process; null while it runs
    reason        of a failure, in words
    """

    state: str = "running"
    update: int = 0
    updates: int = 0
    checkpoint: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    host: str = ""
    pid: int = 0
    ranks: int = 1
    time: str = ""  # of the last change

    @classmethod
    def read(cls, run_dir: Path) -> "Status":
        """The status of a run, as of now: a run whose process is gone without a word has failed.

        Raises ValueError when the folder has no readable status.
        """
        path = run_dir / FILE
        try:
            found = json.loads(path.read_text())
            status = cls(**{f.name: found[f.name] for f in fields(cls)})
        except FileNotFoundError as error:
            raise ValueError(f"{run_dir} is no folder of a run: it has no {FILE}") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); the next start writes it anew"
            ) from error
        if status.state == "running" and not locked(run_dir):
            status.state, status.exit_code = "failed", exits.INTERRUPTED
            status.reason = (
                f"process {status.pid} on {status.host} ended without a word (killed, or the machine went down); the "
                f"same command continues from update {status.update}"
            )
        return status

    def describe(self) -> str:
        """One line for each field that is set."""
        return "\n".join(f"{name:<11} {value}" for name, value in asdict(self).items() if value is not None)


class RunFolder:
    """The folder of a run while a process uses it: locked, with a status that tells the truth when it is left.

    Used as a context manager around every part of a run: an exception that leaves it is written into the status.
    Raises RunInUse if another process has the folder.
    """

    def __init__(self, run_dir: Path, updates: int):
        self.path, self.mute = run_dir, False
        self.lock = _lock(run_dir)
        if distributed.rank() == 0:
            for part in run_dir.glob(f".*{PART}"):
                part.unlink()
        self.status = Status(updates=updates, host=socket.gethostname(), pid=os.getpid(), ranks=distributed.world())

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        if error is None:
            return
        if isinstance(error, SystemExit) and error.code == exits.INTERRUPTED:
            self.tell("interrupted", exits.INTERRUPTED)
        elif not isinstance(error, distributed.PeerFailed):
            told = f"rank {distributed.rank()}: " if distributed.world() > 1 else ""
            self.tell("failed", exits.code_of(error), f"{told}{str(error) or type(error).__name__}")
        self.close()

    def saved(self, checkpoint: Path | None) -> None:
        """Take note of the newest complete checkpoint; None if there is none."""
        self.status.checkpoint = checkpoint and str(checkpoint.relative_to(self.path))
        self.status.update = 0 if checkpoint is None else int(checkpoint.name)
        self.tell("running")

    def tell(self, state: str, exit_code: int | None = None, reason: str | None = None) -> None:
        """Write the status: rank 0 does, or any rank that fails. The first end that is told stays; others follow it."""
        status = self.status
        status.state, status.exit_code, status.reason = state, exit_code, reason
        status.time = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if state != "running":
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads((self.path / FILE).read_text()).get("state") != "running":
                    return
        if distributed.rank() == 0 or state == "failed":
            reason = _write(self.path / FILE, json.dumps(asdict(status), indent=1) + "\n")
            if reason and not self.mute:
                log.error("%s cannot be written (%s): it does not say how this run stands", self.path / FILE, reason)
            self.mute = reason is not None

    def close(self) -> None:
        """Let the folder go."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def locked(run_dir: Path) -> bool:
    """Whether some other process uses the folder."""
    try:
        handle = os.open(run_dir / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(handle)
    return False


def _lock(run_dir: Path) -> int | None:
    """Hold byte RANK of the lock file until it is closed or this process ends, however it ends.

    Rank 0 takes all bytes first, so that no process of another run, or of this one before it was killed, has any.
    POSIX record locks work across the machines of a shared file system, and never against the process itself.
    """
    handle = None
    with distributed.together():
        if distributed.rank() == 0:
            handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            if not _take(handle, 0, 0):
                owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
                os.close(handle)
                raise RunInUse(
                    f"{run_dir} is in use by {owner or 'another process'}. Wait for it, stop it, or give another "
                    "run_dir"
                )
            with contextlib.suppress(OSError):  # a full disk
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            fcntl.lockf(handle, fcntl.LOCK_UN, 0, 1)
    if distributed.rank() > 0:
        handle = os.open(run_dir / LOCK, os.O_RDWR)
        _take(handle, distributed.rank(), 1)
    return handle


def _take(handle: int, start: int, length: int) -> bool:
    """Lock some bytes; False when another process has them."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("the run folder cannot be locked (%s): start no second process on it", error.strerror)
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def _write(path: Path, text: str) -> str | None:
    """Replace the status; on a full disk write over it, for which the space is there already. Why that failed, too."""
    try:
        replace_text(path, text)
    except OSError as error:
        reason = error.strerror
        try:
            with path.open("r+b") as file:
                file.write(text.encode())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return reason
    return None
