"""Exit codes: of the command, of `reca status`, and in status.json. docs/failure.md says what to do on each."""

import contextlib
import os
import sys

DONE = 0
BUG = 1  # an exception that nobody foresaw, with its traceback
USAGE = 2
RECIPE = 3  # recipe, option, or a checkpoint that does not belong to it
DATA = 4  # data or disk
NON_FINITE = 5
NOT_SAVED = 6  # training ended or was interrupted, and the last checkpoint could not be written
IN_USE = 7  # another process uses the run folder
NOT_LEARNING = 8  # stopped by an alarm (eval.stop_on_alarm), or a dry run that did not learn (--overfit)
INTERRUPTED = 75  # EX_TEMPFAIL: saved, the same command continues
STOPPED = 130  # Ctrl-C outside of training


def expected(error: BaseException) -> int | None:
    """Return the exit code of an error that needs no traceback, because its message suffices; None for any other."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return code
    if isinstance(error, OSError):
        return DATA
    return RECIPE if isinstance(error, ValueError) else None


def code_of(error: BaseException) -> int:
    """Return the exit code that a process ends with on this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    return expected(error) or BUG


def exit_process(code: int) -> None:
    """End the process here if torchrun started it.

    On a busy machine a finished rank was seen to abort while the interpreter shut down (torch 2.13, gloo:
    "terminate called without an active exception"), which torchrun reports as a failed run.
    """
    if "RANK" in os.environ:
        end_now(code)


def end_now(code: int) -> None:
    """End the process here: torch aborts where a thread still computes while the interpreter shuts down."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            stream.flush()
    os._exit(code)
