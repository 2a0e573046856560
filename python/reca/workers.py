"""Processes that jobs run in, one for each core or GPU, each computing with one thread."""

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

from reca import exits, library_logs
from reca.environment import environment

FORK_SERVER = sys.platform == "linux"  # what a Mac's libraries import does not outlive a fork
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # of any library


def prepare(*modules: str) -> None:
    """Begin to import what jobs need, in the process that those of cores are forked from, and return at once.

    A command calls it before its own imports, which take as long. Only the first call of a process has an effect.
    """
    if FORK_SERVER:
        multiprocessing.forkserver.set_forkserver_preload(["reca.quiet_imports", *modules])
        with environment(**ONE_THREAD):
            multiprocessing.forkserver.ensure_running()


class Workers:
    """One process for every slot: None for a core, or what CUDA_VISIBLE_DEVICES calls a GPU.

    It is used again for the next job, except on a GPU, whose memory it gives back. That of a core is forked from one
    that has imported what jobs need. One of a GPU imports that itself, as CUDA does not outlive a fork.
    """

    def __init__(self, slots: Sequence[str | None], modules: Sequence[str]):
        """Start the processes. modules: what jobs need."""
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
                process.terminate()  # a run saves first
        for pool in self.pools.values():
            pool.shutdown(wait=kind is None, cancel_futures=True)

    def start(self, work: Callable[..., Any], given: Sequence[Any]) -> tuple[int, Future]:
        """Start a job on the first idle slot. Returns its number, and what will have the job's result."""
        slot = self.idle.pop(0)
        if slot not in self.pools:
            self.pools[slot] = self._open(self.slots[slot])
        return slot, self.pools[slot].submit(_work, work, given)

    def free(self, slot: int, broken: bool) -> None:
        """Take a slot back. The next job has a new process after one that failed, which may have killed its own."""
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
    """Leave out what libraries say of their future versions and of parts that are not used here."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    library_logs.leave_out_unused()


def _begin(gpu: str | None, environment: dict[str, str]) -> None:
    """Set up a process of a slot. environment: of the parent now; a forked process has that of its server's start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent ends them
    threading.Thread(target=_end_with_parent, args=(parent_process(),), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    quiet()


def _end_with_parent(parent: BaseProcess) -> None:
    """Send SIGTERM to this process when its parent is gone, which ends one that waits for a job: a run saves first."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(work: Callable[..., Any], given: Sequence[Any]) -> Any:
    """Do a job. The process ends with it if its parent is gone."""
    gc.collect()
    gc.freeze()  # what was imported stays: the collector took 0.2 s each time to find that out
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
