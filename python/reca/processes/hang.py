"""Diagnosis of a run that makes no progress: stacks and collectives of all ranks, before a timeout ends the job.

run_dir/hang/
    rank_<rank>.txt         stacks of all threads, with the step and its phase
    rank_<rank>.json        summary of the same in one line, which rank 0 combines in its log
    collectives_<rank>      PyTorch's flight recorder at the same time (torchfrtrace --prefix collectives_ FOLDER)
    timeout_<rank>          flight recorder that NCCL writes when a collective has timed out
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from reca import distributed
from reca.io.files import parse_json
from reca.io.folders import write_atomically
from reca.io.paths import exists
from reca.io.shape import OrNull, misfit

log = logging.getLogger("reca")

FOLDER, REQUEST = "hang", "request"
SUMMARY = {
    "rank": int, "step": int, "phase": str, "seconds": int | float, "waits": OrNull(str), "time": int | float,
    "innermost": str, "place": str,
}  # fmt: skip
RECORDED = "2000"  # size of the flight recorder's buffer, in collectives
# Seconds. The stacks are written by a Python thread, which needs the GIL. If another thread holds it, faulthandler's
# own thread writes them this much later.
WITHOUT_PYTHON = 10.0
SHORTEST_POLL, LONGEST_POLL = 0.01, 5.0  # seconds between checks for a late phase or a request of another rank
PACKAGE = Path(__file__).parents[1]


def record_collectives(run_dir: Path) -> None:
    """Make PyTorch record the last collectives, and NCCL write them on a timeout.

    Must be called before the process group is created.
    """
    folder = run_dir.absolute() / FOLDER
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "timeout_"))


class HangWatch:
    """Watches that no phase of a step takes longer than `limit` seconds. A context manager that all ranks must enter.

    If one does on any rank, all ranks write what they are doing, and rank 0 logs which ranks wait for which. The run
    continues until its own timeout (parallel.step_timeout_minutes). limit: 0 disables the watch.
    """

    def __init__(self, run_dir: Path, limit: float, without_python: float = WITHOUT_PYTHON):
        self.folder, self.limit, self.without_python = run_dir / FOLDER, limit, without_python
        self.step, self.phase, self.since = 0, "", time.monotonic()
        self.reported: tuple[int, str] | None = None  # step and phase of the last report
        self.asked = False  # the pending request is from this rank
        self.ended = threading.Event()
        self.main = threading.get_ident()

    def __enter__(self) -> "HangWatch":
        if self.limit:
            with distributed.fail_together():
                self.folder.mkdir(exist_ok=True)
                self.file = (self.folder / f"rank_{distributed.rank()}.txt").open("a")
            self.thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.limit:
            return
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        self.thread.join()
        self._withdraw()
        self.file.close()
        with contextlib.suppress(OSError):
            if not os.path.getsize(self.file.name):
                os.unlink(self.file.name)
            self.folder.rmdir()  # if it is empty

    def enter(self, step: int, phase: str) -> None:
        """Begin a phase of a step. phase: its name in the report."""
        late, before = time.monotonic() - self.since, (self.step, self.phase)
        self.step, self.phase, self.since = step, phase, time.monotonic()
        if not self.limit:
            return
        if self.reported == before:
            log.warning("step %d: %s ended after %.0f s", before[0], before[1], late)
            self._withdraw()
        faulthandler.dump_traceback_later(self.limit + self.without_python, file=self.file)

    def _watch(self) -> None:
        poll = min(max(self.limit / 4, SHORTEST_POLL), LONGEST_POLL)
        while not self.ended.wait(poll):
            now = self.step, self.phase
            if self.phase and self.reported != now:
                late = time.monotonic() - self.since > self.limit
                if late or self._is_asked():
                    self._report(now, late)

    def _report(self, now: tuple[int, str], late: bool) -> None:
        self.reported = now
        started = time.time()
        try:
            if late:
                self._ask()
                if now != (self.step, self.phase):  # it has ended in between, and found no request to withdraw
                    self._withdraw()
            self._dump()
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.folder, error)
        if distributed.rank() == 0:
            self.ended.wait(min(2 * self.limit, 2 * LONGEST_POLL))  # for the other ranks, which poll every few seconds
            log.warning(summary(self._reports(started - self.limit), distributed.world_size(), self.folder))

    def _dump(self) -> None:
        """Write this rank's stacks, their summary, and its collectives."""
        faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - self.since
        print(
            f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {distributed.rank()}, step {self.step}: {self.phase} for "
            f"{seconds:.1f} s",
            file=self.file,
            flush=True,
        )
        faulthandler.dump_traceback(self.file, all_threads=True)
        frame = sys._current_frames().get(self.main)
        state = {"rank": distributed.rank(), "step": self.step, "phase": self.phase, "seconds": round(seconds, 1)}
        state |= {"waits": waits_for_others(frame), "time": time.time()}
        state |= {"innermost": innermost(frame), "place": innermost(frame, PACKAGE)}
        write_atomically(self.folder / f"rank_{distributed.rank()}.json", json.dumps(state))
        if (recorded := recorded_collectives()) is not None:
            (self.folder / f"collectives_{distributed.rank()}").write_bytes(recorded)

    def _ask(self) -> None:
        """Request stacks from all ranks, unless a request is pending."""
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.folder / REQUEST, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            self.asked = True

    def _is_asked(self) -> bool:
        return exists(self.folder / REQUEST)

    def _withdraw(self) -> None:
        if self.asked:
            self.asked = False
            with contextlib.suppress(OSError):  # a report is no reason to end the run
                (self.folder / REQUEST).unlink()

    def _reports(self, after: float) -> list[dict[str, Any]]:
        """Read the summaries that ranks have written since a time, ordered by rank. Damaged ones are left out."""
        found = []
        for path in self.folder.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError):
                state = parse_json(path.read_text())
                if misfit(state, SUMMARY) is None and state["time"] >= after:
                    found.append(state)
        return sorted(found, key=lambda state: state["rank"])


def clean(run_dir: Path) -> None:
    """Remove useless files that a killed run left: its request, and files without stacks, of any rank.

    Only rank 0 may call it, before any rank watches.
    """
    folder = run_dir / FOLDER
    (folder / REQUEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for path in folder.glob("rank_*.txt"):
            if not path.stat().st_size:
                path.unlink()
        folder.rmdir()  # if it is empty


def summary(reports: list[dict[str, Any]], ranks: int, folder: Path) -> str:
    """Describe in which step which ranks wait for others, which are busy, and which do not answer."""
    here = {state["rank"]: state for state in reports}
    waiting = [state for state in reports if state["waits"]]
    busy = [state for state in reports if not state["waits"]]
    silent = [rank for rank in range(ranks) if rank not in here]
    step, longest = max((s["step"] for s in reports), default=0), max((s["seconds"] for s in reports), default=0.0)
    parts = [
        f"rank {s['rank']} has been in {s['phase']} of step {s['step']} for {s['seconds']:.0f} s, at {s['innermost']}"
        + (f", called by {s['place']}" if s["place"] != s["innermost"] else "")
        for s in busy
    ]
    if waiting:
        places = sorted({f"{s['waits']} at {s['place']}" for s in waiting})
        parts.append(f"ranks waiting for others: {numbers([s['rank'] for s in waiting])} (in {', '.join(places)})")
    if silent:
        parts.append(f"no answer (stopped, dead, or in a call that holds the GIL): {numbers(silent)}")
    text = f"step {step} has made no progress for {longest:.0f} s: {'; '.join(parts)}"
    return f"{text}. Stacks of all ranks are in {folder}"


def numbers(ranks: list[int]) -> str:
    """Format ranks as ranges: 0, 2-7."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join("-".join(map(str, part)) for part in parts)


def waits_for_others(frame: FrameType | None) -> str | None:
    """Return the name of the collective that a thread is in; None if it is in none. frame: its innermost frame."""
    found = None
    while frame is not None:
        if "torch/distributed/" in frame.f_code.co_filename and frame.f_code.co_name != "wrapper":
            found = frame.f_code.co_name  # in the end that of the outermost call: the public function
        elif found:
            return found
        frame = frame.f_back
    return found


def innermost(frame: FrameType | None, package: Path | None = None) -> str:
    """Return the innermost function that a thread is in, or its innermost function of a package, with its line."""
    while package and frame is not None and package not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(PACKAGE) if PACKAGE in path.parents else path.name
    return f"{frame.f_code.co_name} ({name}:{frame.f_lineno})"


def recorded_collectives() -> bytes | None:
    """Return the contents of PyTorch's flight recorder, pickled as its analyzer expects; None without a recorder."""
    if not dist.is_initialized():
        return None
    module = torch._C._distributed_c10d
    names = ("_dump_nccl_trace", "_dump_fr_trace") if dist.get_backend() == "nccl" else ("_dump_fr_trace",)
    for name in names:
        if hasattr(module, name):
            with contextlib.suppress(Exception):  # private, so it differs between builds of torch
                return getattr(module, name)()
    return None
