"""Ranks of a gloo group as forks of this process, so that everything is imported once."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from typing import Any


def fork_ranks(ranks: int, work: Callable[[int], int | None]) -> list[int]:
    """Fork so many processes, each of which calls work(its rank) and ends. Returns their process ids.

    work: returns an exit code, None for 0; an exception is printed and ends its process with 1. More than one process
    finds in its environment what torchrun would put there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
        code = 1
        try:
            code = work(rank) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def in_new_process(work: Callable[..., None], *given: Any) -> int:
    """Call a function of a module, with arguments that can be pickled, in a new interpreter. Returns the exit code.

    A torch for CUDA lets no fork compute a gradient once its parent did, as the process of the tests has.
    """
    process = get_context("spawn").Process(target=work, args=given)
    process.start()
    process.join()
    return process.exitcode


def exit_codes(children: Iterable[int]) -> list[int]:
    """Wait for processes and return their exit codes; minus the signal where one ended a process."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
