"""Jobs that run side by side: a process for each core or GPU, and a job starts when those it needs are done.

What a job computes does not depend on how many run at once: every process computes with one thread on a CPU, and sees
one GPU where there are some.
"""

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

from reca import exits, library_logs

POLL_SECONDS = 0.2
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
    with _one_thread(), _Workers(slots[: max(1, len(jobs))], modules) as workers:
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
                    slot, future = workers.start(job, [results[name] for name in job.uses])
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


class _Workers:
    """One process for every slot. It is used again for the next job, except on a GPU, whose memory it gives back."""

    def __init__(self, slots: Sequence[str | None], modules: Sequence[str]):
        """modules: imported, which takes seconds, while the first jobs run."""
        self.slots, self.modules = slots, modules
        self.pools = {number: self._open(name) for number, name in enumerate(slots)}
        self.idle = list(self.pools)

    def __enter__(self) -> "_Workers":
        for pool in self.pools.values():
            pool.submit(_import, self.modules)
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):  # which a terminal sends to all processes
            for process in active_children():
                process.terminate()  # a run saves first
        for pool in self.pools.values():
            pool.shutdown(wait=kind is None, cancel_futures=True)

    @staticmethod
    def _open(gpu: str | None) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(gpu,))

    def start(self, job: Job, results: Sequence[Any]) -> tuple[int, Future]:
        """Start a job. results: of the jobs that it uses."""
        slot = self.idle.pop(0)
        return slot, self.pools[slot].submit(_work, job, results)

    def free(self, slot: int, broken: bool) -> None:
        """Take a slot back. Its process is replaced after a job that failed, which may have killed it."""
        if broken or self.slots[slot] is not None:
            self.pools[slot].shutdown(wait=False)
            self.pools[slot] = self._open(self.slots[slot])
        self.idle.append(slot)


def _begin(gpu: str | None) -> None:
    """Set up a process of a slot."""
    threading.Thread(target=_end_with_parent, args=(parent_process(),), daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    for category in (FutureWarning, DeprecationWarning):  # of libraries, about their future versions
        warnings.simplefilter("ignore", category)
    library_logs.leave_out_unused()


def _end_with_parent(parent: BaseProcess) -> None:
    """Send SIGTERM to this process when its parent is gone, which ends one that waits for a job: a run saves first."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(job: Job, results: Sequence[Any]) -> Any:
    """Do a job. results: of the jobs that it uses. The process ends with it if its parent is gone."""
    gc.collect()
    gc.freeze()  # what was imported stays: the collector took 0.2 s each time to find that out
    try:
        return job.work(*job.given, *results)
    finally:
        gc.unfreeze()
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(exits.INTERRUPTED)


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        import_module(name)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Make the processes that start inside compute with one thread, whatever library computes."""
    before = {name: os.environ.get(name) for name in THREAD_COUNTS}
    os.environ.update(dict.fromkeys(THREAD_COUNTS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check(jobs: Collection[Job]) -> None:
    known: set[str] = set()
    left = list(jobs)
    while left:
        ready = [job for job in left if known.issuperset(job.needs)]
        if not ready:
            raise ValueError(f"{left[0].name} waits for {', '.join(left[0].needs)}: a job that is not there, or for it")
        known.update(job.name for job in ready)
        left = [job for job in left if job not in ready]
