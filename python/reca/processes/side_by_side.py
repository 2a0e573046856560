"""Parallel execution of dependent jobs: one process per core or GPU; a job starts when the jobs it needs are done.

Results do not depend on the number of parallel jobs: every process uses a single CPU thread and sees at most one GPU.
"""

import itertools
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from reca.hardware import cgroups
from reca.processes.own_process import Killed
from reca.processes.workers import Workers

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A function call to run in another process.

    work   module-level function, called with `given` and the results of the jobs in `uses`; its result is pickled
    given  its first arguments
    after  names of jobs that must be done before, whose results are not passed
    uses   names of jobs that must be done before, whose results are passed to `work`
    """

    name: str
    work: Callable[..., Any]
    given: tuple = ()
    after: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.after, *self.uses)


@dataclass(frozen=True)
class Failure:
    """Reason why a job has no result: its own error, or the name of a required job that has none."""

    error: BaseException | None
    missing: str | None = None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.missing} failed"
        return f"{type(self.error).__name__}: {self.error}"


def run(
    jobs: Sequence[Job],
    slots: Sequence[str | None],
    on_end: Callable[[Job, Any], None] = lambda job, result: None,
    on_wait: Callable[[], object] = lambda: None,
    on_start: Callable[[Job], object] = lambda job: None,
) -> dict[str, Any]:
    """Run all jobs and return their results by name, with a `Failure` for a job that failed or could not run.

    A failed job prevents only the jobs that need it. Jobs that are ready start in the given order.

    slots: from `cores` or `gpus`; one job runs per slot. on_end: called with a job and its result when it ends.
    on_wait: called every POLL_SECONDS. on_start: called with a job when it starts.

    An exception in this function, such as SystemExit on a signal, sends SIGTERM to the running jobs; a training run
    then saves and exits.
    Raises ValueError for circular dependencies and for a dependency on an unknown job.
    """
    _check(jobs)
    results: dict[str, Any] = {}
    waiting, running = list(jobs), dict[int, tuple[Job, Future]]()

    def end(job: Job, result: Any) -> None:
        results[job.name] = result
        on_end(job, result)

    modules = sorted({job.work.__module__ for job in jobs})
    with Workers(slots[: max(1, len(jobs))], modules) as workers:
        while waiting or running:
            for slot, (job, future) in list(running.items()):
                if future.done():
                    del running[slot]
                    error = future.exception()
                    workers.free(slot, broken=error is not None)
                    if isinstance(error, BrokenProcessPool):
                        error = Killed(
                            "its process ended without a result: it crashed, or was killed, which the kernel does when "
                            "a machine runs out of memory (see dmesg). Free memory, then run the same command again"
                        )
                    end(job, Failure(error) if error else future.result())
            for job in list(waiting):
                lost = [name for name in job.needs if isinstance(results.get(name), Failure)]
                if lost:
                    waiting.remove(job)
                    end(job, Failure(None, lost[0]))
                elif workers.idle and all(name in results for name in job.needs):
                    waiting.remove(job)
                    on_start(job)
                    slot, future = workers.start(job.work, [*job.given, *(results[name] for name in job.uses)])
                    running[slot] = job, future
            on_wait()
            if running:
                time.sleep(POLL_SECONDS)
    return results


def cores() -> list[None]:
    """Return one slot per CPU core that this process may use."""
    return [None] * cgroups.cpus()


def gpus() -> list[str]:
    """Return one slot per GPU that this process may use, named as in CUDA_VISIBLE_DEVICES.

    CUDA ignores what follows an invalid name, such as -1, which hides all GPUs.
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = (name.strip() for name in given.split(","))
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    return [str(number) for number in range(torch.cuda.device_count())]


def _check(jobs: Collection[Job]) -> None:
    known: set[str] = set()
    left = list(jobs)
    while left:
        ready = [job for job in left if known.issuperset(job.needs)]
        if not ready:
            raise ValueError(
                f"{left[0].name} needs {', '.join(left[0].needs)}: an unknown job, or a circular dependency"
            )
        known.update(job.name for job in ready)
        left = [job for job in left if job not in ready]
