"""Worker processes for jobs: one per core or GPU, each with a single compute thread."""

import gc
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

from reca import exits
from reca.processes import library_logs
from reca.processes.environment import environment

FORK_SERVER = sys.platform == "linux"  # on macOS some imported libraries do not survive a fork
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # of any library


def prepare(*modules: str) -> None:
    """Start the fork server, which imports the modules that jobs need, and return immediately.

    Call it before slow imports, so that both run in parallel. Only the first call in a process has an effect.
    """
    if FORK_SERVER:
        multiprocessing.forkserver.set_forkserver_preload(["reca.processes.quiet_imports", *modules])
        with environment(**ONE_THREAD):
            multiprocessing.forkserver.ensure_running()


class Workers:
    """One process per slot: None for a core, or a GPU's name in CUDA_VISIBLE_DEVICES.

    A core's process is forked from a server that has imported the jobs' modules, and is reused. A GPU's process is
    spawned, because CUDA does not survive a fork, and is replaced after each job to release its memory.
    """

    def __init__(self, slots: Sequence[str | None], modules: Sequence[str]):
        """Start the processes. modules: names of modules that jobs need."""
        self.slots, self.modules = slots, modules
        if None in slots:
            prepare(*modules)
        self.pools = {number: self._open(name) for number, name in enumerate(slots)}
        self.idle = list(self.pools)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            for process in active_children():
                process.terminate()  # a training run saves before it exits
        for pool in self.pools.values():
            pool.shutdown(wait=kind is None, cancel_futures=True)

    def start(self, work: Callable[..., Any], given: Sequence[Any]) -> tuple[int, Future]:
        """Start a job on the first idle slot. Return the slot's number and a future of the result."""
        slot = self.idle.pop(0)
        if slot not in self.pools:
            self.pools[slot] = self._open(self.slots[slot])
        return slot, self.pools[slot].submit(_work, work, given)

    def free(self, slot: int, broken: bool) -> None:
        """Mark a slot as idle. broken: the job failed and may have killed its process, so replace the process."""
        if broken or self.slots[slot] is not None:
            self.pools.pop(slot).shutdown(wait=False)
        self.idle.append(slot)

    def _open(self, gpu: str | None) -> ProcessPoolExecutor:
        context = get_context("forkserver" if FORK_SERVER and gpu is None else "spawn")
        with environment(**ONE_THREAD):
            pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(gpu, dict(os.environ)))
            pool.submit(_import, self.modules)  # starts the process
        return pool


def quiet() -> None:
    """Suppress deprecation warnings of libraries and warnings about features that reca does not use."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    library_logs.leave_out_unused()


def _begin(gpu: str | None, environment: dict[str, str]) -> None:
    """Initialise a worker process. environment: the parent's current one; the fork server's may be outdated."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent terminates its workers
    threading.Thread(target=_end_with_parent, args=(parent_process(),), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    quiet()


def _end_with_parent(parent: BaseProcess) -> None:
    """Send SIGTERM to this process when its parent dies. An idle worker exits; a training run saves first."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(work: Callable[..., Any], given: Sequence[Any]) -> Any:
    """Run a job. Exit the process afterwards if its parent has died."""
    gc.collect()
    gc.freeze()  # exclude imported objects from garbage collection, which took 0.2 s each time
    try:
        return work(*given)
    finally:
        gc.unfreeze()
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(exits.INTERRUPTED)


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        import_module(name)
