"""Exit codes of all commands and in status.json. docs/failure.md says what to do about each."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from reca.launcher import is_launched

DONE = 0
BUG = 1  # unexpected exception, with its traceback
USAGE = 2
RECIPE = 3  # recipe, option, or a checkpoint that does not belong to the recipe
DATA = 4  # data or disk
NON_FINITE = 5
NOT_SAVED = 6  # training ended or was interrupted, and the last checkpoint could not be written
IN_USE = 7  # another process uses the run folder
NOT_LEARNING = 8  # stopped by an alarm (eval.stop_on_alarm), or a dry run that did not learn (--overfit)
INTERRUPTED = 75  # EX_TEMPFAIL: saved; the same command resumes
STOPPED = 130  # Ctrl-C outside of training


def expected(error: BaseException) -> int | None:
    """Return the exit code of an error whose message suffices without a traceback; None for any other error."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return code
    if isinstance(error, OSError):
        return DATA
    return RECIPE if isinstance(error, ValueError) else None


def code_of(error: BaseException) -> int:
    """Return the exit code of a process that ends with this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    return expected(error) or BUG


def finish_output(code: int) -> int:
    """Write what stdout still holds. Return the exit code of the process, which is DATA if a full disk lost output.

    Otherwise the interpreter writes it at its end, and exits with 120 if that fails.
    """
    if sys.stdout is None:  # closed by the shell, as `>&-`
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        print(f"reca: the output is lost ({error.strerror})", file=sys.stderr)
        return code or DATA
    return code


def outlive_reader() -> None:
    """Let the process go on where the reader of stdout ends, such as head: the rest of the output is discarded."""

    def outliving(write: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            try:
                return write(*arguments)
            except BrokenPipeError:
                discard_output()
                return write(*arguments)

        return called

    if isinstance(sys.stdout, io.TextIOWrapper) and "write" not in vars(sys.stdout):
        vars(sys.stdout).update(write=outliving(sys.stdout.write), flush=outliving(sys.stdout.flush))


def discard_output() -> None:
    """Send what stdout still holds, and all that follows, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # not a file
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def exit_process(code: int) -> None:
    """End the process without interpreter shutdown if torchrun started it.

    On a busy machine, finished ranks sometimes abort during interpreter shutdown (torch 2.13, gloo: "terminate called
    without an active exception"), which torchrun reports as a failed run.
    """
    if is_launched():
        end_now(code)


def end_now(code: int) -> None:
    """End the process without interpreter shutdown, during which torch aborts if a thread still computes.

    Semaphores of multiprocessing, such as that of tqdm from Python 3.14 on, are released: else a warning names them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    if util := sys.modules.get("multiprocessing.util"):
        util._run_finalizers(0)
    os._exit(code)
