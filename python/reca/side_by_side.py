"""Jobs that run side by side: a process for each core or GPU, and a job starts when those it needs are done.

What a job computes does not depend on how many run at once: every process computes with one thread on a CPU, and sees
one GPU where there are some.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from reca.workers import Workers

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A call in another process.

    work   function of a module, called with `given` and the results of the jobs in `uses`; its result is pickled
    after  names of jobs that must be done before
    uses   names of such jobs whose results it is called with
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
    """Why a job has no result: its own error, or the name of a job before it that has none."""

    error: BaseException | None
    missing: str | None = None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.missing} did not end well"
        return f"{type(self.error).__name__}: {self.error}"


def run(
    jobs: Sequence[Job],
    slots: Sequence[str | None],
    on_end: Callable[[Job, Any], None] = lambda job, result: None,
    on_wait: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Run all jobs and return their results by name; a `Failure` stands for one that has none.

    A job that fails stops those that come after it, and no others. Jobs start in the order in which they are given.

    slots: what `cores` or `gpus` returns: as many jobs run at once. on_end: called with a job and its result as soon as
    it has one. on_wait: called a few times in a second.

    An exception in here, such as SystemExit on a signal, sends SIGTERM to the jobs that run. A run then saves and ends.
    Raises ValueError for jobs that wait for one another, or for one that is not there.
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
                    workers.free(slot, broken=isinstance(future.exception(), BaseException))
                    end(job, Failure(future.exception()) if future.exception() else future.result())
            for job in list(waiting):
                lost = [name for name in job.needs if isinstance(results.get(name), Failure)]
                if lost:
                    waiting.remove(job)
                    end(job, Failure(None, lost[0]))
                elif workers.idle and all(name in results for name in job.needs):
                    waiting.remove(job)
                    slot, future = workers.start(job.work, [*job.given, *(results[name] for name in job.uses)])
                    running[slot] = job, future
            on_wait()
            if running:
                time.sleep(POLL_SECONDS)
    return results


def cores() -> list[None]:
    """List a slot for every core that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [None] * (usable or 1)


def gpus() -> list[str]:
    """List a slot for every GPU that this process may use, by what CUDA_VISIBLE_DEVICES calls it."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _check(jobs: Collection[Job]) -> None:
    known: set[str] = set()
    left = list(jobs)
    while left:
        ready = [job for job in left if known.issuperset(job.needs)]
        if not ready:
            raise ValueError(f"{left[0].name} waits for {', '.join(left[0].needs)}: a job that is not there, or for it")
        known.update(job.name for job in ready)
        left = [job for job in left if job not in ready]
