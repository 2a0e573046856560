"""Calls in a subprocess without GPUs and without a process group."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of an importable module in a subprocess without GPUs and without a process group.

    Exceptions of the function are raised here.
    """
    joined = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {key: value for key, value in os.environ.items() if key not in joined}
    environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "reca.processes.own_process"],
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        env=environ,
        check=True,
    )
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
