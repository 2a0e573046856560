"""The run folder while a process uses it: locked, with its status written on every exit."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reca import checkpoint, distributed, exits
from reca.errors import PeerFailed, lost_rank
from reca.io.files import parse_json
from reca.io.folders import PART, write_atomically
from reca.io.paths import is_dir
from reca.runs import folder_lock
from reca.runs.status import FILE as STATUS_FILE
from reca.runs.status import Status

log = logging.getLogger("reca")

SEEN_AFTER = 70.0  # seconds; NFS may cache for 60 s that a file does not exist (acdirmax)


class RunInUse(RuntimeError):
    """Another process uses this run folder."""

    exit_code = exits.IN_USE


class RunFolder:
    """The run folder while a process uses it: locked, with its status written on every exit.

    A context manager around each phase of a run: an exception that passes through it is recorded in the status.
    If the folder contains a finished run, none of its files change before `accept`, because the start may be rejected.
    Raises RunInUse if another process, or another active run of this process, uses the folder.
    """

    def __init__(self, run_dir: Path, steps: int):
        self.run_dir = self.path = run_dir  # as given, and where it is as far as is known
        self.write_failed, self.busy, self.begun = False, False, False
        self.lock: int | None = _lock(run_dir)
        self.key = folder_lock.key(self.lock)
        folder_lock.holders[self.key] = self
        with distributed.fail_together():
            if distributed.rank() == 0:
                for part in run_dir.glob(f".*{PART}"):
                    part.unlink()
        self.waiting: list[tuple[Path, bytes]] = []  # files to write in `accept`
        self.held, self.before = False, None
        with contextlib.suppress(ValueError):
            self.before = Status.written(run_dir)
            self.held = self.before.state == "finished"
        self.status = Status(steps=steps, host=socket.gethostname(), pid=os.getpid(), ranks=distributed.world_size())

    def __enter__(self) -> "RunFolder":
        if self.lock is None:
            raise RunInUse(
                f"this run has released {self.path}: it ended, or another run started there. Create a new Trainer"
            )
        self.busy = True
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        self.busy = False
        if error is None:
            return
        if isinstance(error, SystemExit) and error.code == exits.INTERRUPTED:
            self.write_status("interrupted", exits.INTERRUPTED)
        elif not isinstance(error, PeerFailed):
            prefix = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
            self.write_status(
                "failed", exits.code_of(error), f"{prefix}{lost_rank(error) or str(error) or type(error).__name__}"
            )
        self.close()

    def accept(self) -> None:
        """Accept the start after all checks: write the pending files and the status."""
        self.held = False
        if distributed.rank() == 0:
            for path, content in self.waiting:
                write_atomically(path, content)
        self.waiting = []
        self.write_status("running")

    def write_accepted(self, path: Path, content: bytes) -> None:
        """Schedule a file to be written by `accept`."""
        self.waiting.append((path, content))

    def is_lost(self) -> bool:
        """Tell whether its path leads to another folder or to none, because it was moved or removed during the run.

        A lock file that was removed alone, and a file system that does not answer, are no evidence of that.
        """
        return not self._is_at(self.run_dir)

    def _is_at(self, path: Path) -> bool:
        if self.lock is None:
            return True
        with contextlib.suppress(OSError):
            try:
                return folder_lock.key(path / folder_lock.FILE) == folder_lock.key(self.lock)
            except FileNotFoundError:
                return is_dir(path) and not self._has_lock_file()
        return True

    def reject_lost(self) -> None:
        """Raise OSError on rank 0 if the folder is lost, and PeerFailed on the others. All ranks must call it.

        The status is then written where the folder is, as far as the system tells that.
        """
        with distributed.fail_together():
            if distributed.rank() == 0 and self.is_lost():
                raise self._loss()

    def _loss(self) -> OSError:
        old = self.run_dir
        if not self._has_lock_file():
            return OSError(f"the run folder {old} was removed during the run, with its checkpoints and logs")
        place = "where it was moved to"
        with contextlib.suppress(OSError):
            self.path = Path(os.readlink(f"/proc/self/fd/{self.lock}")).parent
            place = f"in {self.path}"
        return OSError(
            f"the run folder {old} was moved during the run: its checkpoints and logs so far lie {place}. Move "
            "it back, or give its new path as run_dir; the same command then resumes from the newest checkpoint"
        )

    def _has_lock_file(self) -> bool:
        """Tell whether the lock file still has a name, in whatever folder."""
        with contextlib.suppress(OSError):
            return self.lock is not None and os.fstat(self.lock).st_nlink > 0
        return False

    def reject_lost_checkpoints(self) -> None:
        """Raise CheckpointError if the status of the start before names a checkpoint and the run has none now.

        The run would otherwise begin again at its first step and overwrite its log. The status keeps the name.
        """
        if self.before is None or self.before.checkpoint is None or checkpoint.latest(self.path) is not None:
            return
        self.status.step, self.status.checkpoint = self.before.step, self.before.checkpoint
        raise checkpoint.CheckpointError(
            f"{self.path} has no checkpoint, but its {STATUS_FILE} names {self.before.checkpoint}: was it removed, or "
            f"is its disk not mounted? Restore it, or remove {self.path / STATUS_FILE} to start from the first step"
        )

    def record_checkpoint(self, checkpoint: Path | None) -> None:
        """Record the latest complete checkpoint in the status; None if there is none."""
        self.status.set_checkpoint(checkpoint)
        self.write_status("running")

    def record_alarms(self, alarms: Sequence[str]) -> None:
        """Record the active alarms of the last evaluation in the status."""
        self.status.alarm = "; ".join(alarms) or None
        self.write_status("running")

    def write_status(self, state: str, exit_code: int | None = None, reason: str | None = None) -> None:
        """Write the status, on rank 0 or on a rank that failed.

        The first final state is kept: later writes are ignored, and until `accept` also those over a finished run.
        Nothing is written to the folder of another run at this one's path.
        """
        if self.held or not self._is_at(self.path):
            return
        status = self.status
        status.state, status.exit_code, status.reason = state, exit_code, reason
        status.time = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        begins, self.begun = state == "running" and not self.begun, True
        if not begins:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if parse_json((self.path / STATUS_FILE).read_text()).get("state") != "running":
                    return
        if distributed.rank() == 0 or state == "failed":
            reason = _write(self.path / STATUS_FILE, json.dumps(asdict(status), indent=1) + "\n")
            if reason and not self.write_failed:
                log.error("%s cannot be written (%s): it is out of date", self.path / STATUS_FILE, reason)
            self.write_failed = reason is not None

    def close(self) -> None:
        """Release the folder."""
        if self.lock is not None:
            del folder_lock.holders[self.key]
            os.close(self.lock)
            self.lock = None


def _release_earlier_run(run_dir: Path) -> None:
    """Release the folder if an earlier run of this process holds it. Raises RunInUse if that run is still active."""
    with contextlib.suppress(FileNotFoundError):
        if held := folder_lock.holders.get(folder_lock.key(run_dir / folder_lock.FILE)):
            if held.busy:
                raise RunInUse(f"{run_dir} is in use by this very process. Wait for that run, or set another run_dir")
            held.close()


def _lock(run_dir: Path) -> int:
    """Lock byte RANK of the lock file until it is closed or this process dies. Return the file descriptor.

    Rank 0 first locks all bytes, to ensure that no process of another run or of an earlier start holds one.
    """
    with distributed.fail_together():
        _release_earlier_run(run_dir)
        if distributed.rank() == 0:
            handle = lock_alone(run_dir, "set another run_dir")
            with contextlib.suppress(OSError):  # on a file system without locks there is none to release
                fcntl.lockf(handle, fcntl.LOCK_UN, 0, 1)
    with distributed.fail_together():
        if distributed.rank() > 0:
            handle = _open_of_rank_0(run_dir / folder_lock.FILE)
            folder_lock.acquire(handle, distributed.rank(), 1)
    owners = distributed.all_gather(folder_lock.owner(handle))
    with distributed.fail_together():
        if owners[0] != owners[distributed.rank()]:
            raise OSError(_not_shared(run_dir))
    return handle


def lock_alone(folder: Path, instead: str) -> int:
    """Lock a folder for this process alone and return the handle of its lock file.

    instead: what the user can do to use another folder. Raises RunInUse if another process has locked it.
    """
    handle = os.open(folder / folder_lock.FILE, os.O_RDWR | os.O_CREAT, 0o666)
    if not folder_lock.acquire(handle, 0, 0):
        owner = folder_lock.owner(handle) or "another process"
        os.close(handle)
        raise RunInUse(f"{folder} is in use by {owner}. Wait for it, stop it, or {instead}")
    folder_lock.write_owner(handle)
    return handle


def _open_of_rank_0(path: Path) -> int:
    """Open the lock file that rank 0 created. On a network file system it may become visible with a delay."""
    end = time.monotonic() + SEEN_AFTER
    while True:
        try:
            return os.open(path, os.O_RDWR)
        except FileNotFoundError as error:
            if time.monotonic() > end:
                raise OSError(_not_shared(path.parent)) from error
            time.sleep(0.5)


def _not_shared(run_dir: Path) -> str:
    return (
        f"rank {distributed.rank()} on {socket.gethostname()} sees a different folder {run_dir} than rank 0: run_dir "
        "must be on a file system that all machines share, under the same path"
    )


def _write(path: Path, text: str) -> str | None:
    """Replace the status file; if that fails, overwrite it in place, which needs no new space on a full disk.

    Return the reason if both fail, otherwise None.
    """
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
