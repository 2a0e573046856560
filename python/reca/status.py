"""Status of a run, for people and batch scripts, in run_dir/status.json; and the lock of its folder.

{"state": "interrupted", "step": 125, "steps": 200, "checkpoint": "checkpoints/000125", "exit_code": 75, ...}
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from reca import distributed, exits
from reca.folders import PART, write_atomically

log = logging.getLogger("reca")

FILE, LOCK = "status.json", ".lock"
LOCK_HELD = (errno.EACCES, errno.EAGAIN)  # what locking fails with where another process has the lock
LOCK_TIMEOUT = 2.0  # seconds in which a process that was killed lets go of its lock


class RunInUse(RuntimeError):
    """Another process uses this run folder."""

    exit_code = exits.IN_USE


@dataclass
class Status:
    """The contents of status.json.

    state         running, interrupted (saved: the same command continues), failed, or finished
    step        steps whose result is in the checkpoint
    steps       steps that the run is to make
    checkpoint    latest complete checkpoint, relative to the run folder; null if there is none
    exit_code     that of the process; null while it runs
    reason        of a failure, in words
    alarm         what the last evaluation warns of (eval.every); null if it warns of nothing
    """

    state: str = "running"
    step: int = 0
    steps: int = 0
    checkpoint: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    alarm: str | None = None
    host: str = ""
    pid: int = 0
    ranks: int = 1
    time: str = ""  # of the last change

    @classmethod
    def read(cls, run_dir: Path) -> "Status":
        """Read the current status of a run. A run whose process has died without writing one has failed.

        Raises ValueError when the folder has no readable status.
        """
        status = cls._written(run_dir)
        if status.state != "running" or _is_running(run_dir, status):
            return status
        status = cls._written(run_dir)  # again: it may just have ended, and let the folder go
        if status.state == "running":
            status.state, status.exit_code = "failed", exits.INTERRUPTED
            status.reason = (
                f"process {status.pid} on {status.host} ended without a word (killed, or the machine went down); the "
                f"same command continues from step {status.step}"
            )
        return status

    @classmethod
    def _written(cls, run_dir: Path) -> "Status":
        path = run_dir / FILE
        try:
            found = json.loads(path.read_text())
            found.setdefault("alarm", None)  # versions before wrote none
            return cls(**{f.name: found[f.name] for f in fields(cls)})
        except FileNotFoundError as error:
            raise ValueError(f"{run_dir} is no folder of a run: it has no {FILE}") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {error}); the next start writes it anew"
            ) from error

    def describe(self) -> str:
        """Write one line for each field that is set."""
        return "\n".join(f"{name:<11} {value}" for name, value in asdict(self).items() if value is not None)


FIELDS = tuple(f.name for f in fields(Status))


class RunFolder:
    """The folder of a run while a process uses it: locked, with its status written on every exit.

    A context manager around every part of a run: an exception that passes through it is written into the status.
    Raises RunInUse if another process, or a run that is going on in this one, has the folder.
    """

    def __init__(self, run_dir: Path, steps: int):
        self.path, self.write_failed, self.busy, self.begun = run_dir, False, False, False
        self.lock: int | None = _lock(run_dir)
        self.key = _key(self.lock)
        _HELD[self.key] = self
        if distributed.rank() == 0:
            for part in run_dir.glob(f".*{PART}"):
                part.unlink()
        self.status = Status(steps=steps, host=socket.gethostname(), pid=os.getpid(), ranks=distributed.world_size())

    def __enter__(self) -> "RunFolder":
        if self.lock is None:
            raise RunInUse(
                f"this run has let {self.path} go, because it has ended or another has begun there: start it again"
            )
        self.busy = True
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        self.busy = False
        if error is None:
            return
        if isinstance(error, SystemExit) and error.code == exits.INTERRUPTED:
            self.write_status("interrupted", exits.INTERRUPTED)
        elif not isinstance(error, distributed.PeerFailed):
            prefix = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
            self.write_status("failed", exits.code_of(error), f"{prefix}{str(error) or type(error).__name__}")
        self.close()

    def record_checkpoint(self, checkpoint: Path | None) -> None:
        """Record the latest complete checkpoint in the status; None if there is none."""
        self.status.checkpoint = None if checkpoint is None else str(checkpoint.relative_to(self.path))
        self.status.step = 0 if checkpoint is None else int(checkpoint.name)
        self.write_status("running")

    def record_alarms(self, alarms: Sequence[str]) -> None:
        """Record in the status what the last evaluation warns of."""
        self.status.alarm = "; ".join(alarms) or None
        self.write_status("running")

    def write_status(self, state: str, exit_code: int | None = None, reason: str | None = None) -> None:
        """Write the status: rank 0 does, or any rank that fails. The first end that is written stays."""
        status = self.status
        status.state, status.exit_code, status.reason = state, exit_code, reason
        status.time = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        begins, self.begun = state == "running" and not self.begun, True
        if not begins:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads((self.path / FILE).read_text()).get("state") != "running":
                    return
        if distributed.rank() == 0 or state == "failed":
            reason = _write(self.path / FILE, json.dumps(asdict(status), indent=1) + "\n")
            if reason and not self.write_failed:
                log.error("%s cannot be written (%s): it is out of date", self.path / FILE, reason)
            self.write_failed = reason is not None

    def close(self) -> None:
        """Release the folder."""
        if self.lock is not None:
            del _HELD[self.key]
            os.close(self.lock)
            self.lock = None


# The folders that this process holds, by what _key answers. A process has no lock against itself, and loses the one it
# has as soon as it closes the lock file, however often that is open: it must not be opened where it is held.
_HELD: dict[tuple[int, int, int], RunFolder] = {}


def _key(file: int | Path) -> tuple[int, int, int]:
    """Identify a lock file, by whatever path, in this process: a fork has none of its parent's locks."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, os.getpid()


def is_locked(run_dir: Path) -> bool | None:
    """Tell whether some process uses the folder; None where the file system has no locks."""
    path = run_dir / LOCK
    try:
        if _key(path) in _HELD:
            return True
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in LOCK_HELD else None
    finally:
        os.close(handle)
    return False


def _is_running(run_dir: Path, status: Status) -> bool:
    """Tell whether a run with status running has a live process. Without locks, only its own machine can tell."""
    in_use = is_locked(run_dir)
    if in_use is not None or status.host != socket.gethostname():
        return in_use is not False
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


def _release_earlier_run(run_dir: Path) -> None:
    """Release the folder if an earlier run of this process holds it. Raises RunInUse if that run is still going on."""
    with contextlib.suppress(FileNotFoundError):
        if held := _HELD.get(_key(run_dir / LOCK)):
            if held.busy:
                raise RunInUse(f"{run_dir} is in use by this very process. Wait for that run, or give another run_dir")
            held.close()


def _lock(run_dir: Path) -> int:
    """Hold byte RANK of the lock file until it is closed or this process ends, however it ends.

    Rank 0 takes all bytes first, so that no process of another run, or of this one before it was killed, has any.
    POSIX record locks work across the machines of a shared file system, and never against the process itself.
    """
    with distributed.fail_together():
        _release_earlier_run(run_dir)
        if distributed.rank() == 0:
            handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            if not _acquire(handle, 0, 0):
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
        _acquire(handle, distributed.rank(), 1)
    return handle


def _acquire(handle: int, start: int, length: int) -> bool:
    """Lock some bytes; False when another process has them."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            return True
        except OSError as error:
            if error.errno not in LOCK_HELD:
                log.warning("the run folder cannot be locked (%s): start no second process on it", error.strerror)
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def _write(path: Path, text: str) -> str | None:
    """Replace the status; on a full disk write over it, for which the space is there already. Why that failed, too."""
    try:
        write_atomically(path, text)
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
