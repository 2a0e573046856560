"""Calls in a subprocess without GPUs and without a process group."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from reca import exits

Result = TypeVar("Result")


class Killed(RuntimeError):
    """A subprocess ended before it had a result."""

    exit_code = exits.RECIPE


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of an importable module in a subprocess without GPUs and without a process group.

    Exceptions of the function are raised here. Raises Killed after SIGKILL, as on a machine whose memory is full.
    """
    joined = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {key: value for key, value in os.environ.items() if key not in joined}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "reca.processes.own_process"],
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        env=environ,
    )
    if done.returncode == -signal.SIGKILL:
        raise Killed(
            f"the subprocess of {function.__module__}.{function.__name__} was killed, which the kernel does when a "
            "machine runs out of memory (see dmesg): free host memory, then run the same command again"
        )
    done.check_returncode()
    result = pickle.loads(done.stdout)
    if isinstance(result, BaseException):
        raise result
    return result


def _answer() -> None:
    """Run the subprocess of `call`."""
    out = os.dup(1)
    os.dup2(2, 1)  # keep library output out of the result
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        result: Any = function(*arguments)
    except Exception as error:
        result = error
    with os.fdopen(out, "wb") as file:
        pickle.dump(result, file)


if __name__ == "__main__":
    _answer()
