"""Status of a run in run_dir/status.json, for users and batch scripts.

{"state": "interrupted", "step": 125, "steps": 200, "checkpoint": "checkpoints/000125", "exit_code": 75, ...}
"""

import contextlib
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from reca import exits
from reca.io.checkpoints import latest
from reca.io.files import parse_json
from reca.io.paths import exists, is_file
from reca.io.shape import misfit
from reca.runs.folder_lock import is_alive, is_locked

FILE = "status.json"


@dataclass
class Status:
    """The contents of status.json.

    state       running, interrupted (saved: the same command resumes it), failed, or finished
    step        step of the latest checkpoint
    steps       train.steps
    checkpoint  latest complete checkpoint, relative to the run folder; null if there is none
    exit_code   exit code of the process; null while it runs
    reason      reason of a failure, or that the checkpoint of an ended run is gone; null otherwise
    alarm       active alarms of the last evaluation (eval.every); null if there are none
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
    time: str = ""  # time of the last change

    @classmethod
    def read(cls, run_dir: Path) -> "Status":
        """Read the current status of a run. If its process died without writing a final state, it counts as failed.

        A checkpoint that such a process completed before it died is in the status, too. The reason also says if the
        checkpoint of an ended run is gone.
        Raises ValueError if the folder has no readable status.
        """
        status = cls.written(run_dir)
        if status.state == "running" and _is_running(run_dir, status):
            return status
        status = cls.written(run_dir)  # read again: the run may have ended and released the folder in between
        if status.state == "running":
            status.state, status.exit_code = "failed", exits.INTERRUPTED
            with contextlib.suppress(OSError):
                if (newest := latest(run_dir)) is not None and int(newest.name) > status.step:
                    status.set_checkpoint(newest)
            status.reason = (
                f"process {status.pid} on {status.host} died without reporting an error (it was killed, or the machine "
                f"went down); the same command resumes from step {status.step}"
            )
        if status.checkpoint is not None and not exists(run_dir / status.checkpoint):
            gone = f"{run_dir / status.checkpoint} is gone: it was removed, or its disk is not mounted"
            status.reason = f"{status.reason}; {gone}" if status.reason else gone
        return status

    @classmethod
    def written(cls, run_dir: Path) -> "Status":
        """Read the status file as written, even if its process has died since. Raises ValueError as `read`."""
        path = run_dir / FILE
        try:
            found = parse_json(path.read_text())
            if misfit(found, SHAPE) is not None:
                raise ValueError("a field is missing, or is of another type")
            return cls(**{name: found[name] for name in FIELDS})
        except (FileNotFoundError, NotADirectoryError) as error:
            run = next((folder for folder in run_dir.absolute().parents if is_file(folder / FILE)), None)
            inside = f"is inside the run folder {run}: pass that folder"
            raise ValueError(f"{run_dir} {inside if run else f'is not a run folder: it has no {FILE}'}") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions and its disk") from error
        except ValueError as error:
            raise ValueError(
                f"{path} cannot be read: expected a JSON object with {', '.join(FIELDS)}; the next start replaces it"
            ) from error

    def set_checkpoint(self, checkpoint: Path | None) -> None:
        """Set the latest complete checkpoint; None if there is none."""
        self.checkpoint = None if checkpoint is None else f"{checkpoint.parent.name}/{checkpoint.name}"
        self.step = 0 if checkpoint is None else int(checkpoint.name)

    def describe(self) -> str:
        """Return one line for each field that is set."""
        return "\n".join(f"{name:<11} {value}" for name, value in asdict(self).items() if value is not None)


SHAPE = get_type_hints(Status)
FIELDS = tuple(SHAPE)


def _is_running(run_dir: Path, status: Status) -> bool:
    """Tell whether a run with status running has a live process.

    Without file locks this is known only on the run's own machine; elsewhere it counts as alive.
    """
    in_use = is_locked(run_dir)
    if in_use is not None or status.host != socket.gethostname():
        return in_use is not False
    return is_alive(status.pid)
