"""Errors of a run, the first line of a message, and printing each message once, however many ranks raise it."""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

from reca import exits
from reca.launcher import is_launched, is_main_process, number

# The parts of messages of gloo, NCCL and the store that prove a lost connection or a late rank; the group is quoted.
_LOST = re.compile(
    r"\[[^\]]*gloo[^\]]*\] ?(?:Read error |Write error )?(.*?(?:closed by peer|reset by peer|Broken pipe))"
    r"|nccl[\s\S]*?(remote process exited|closed by remote peer|reset by peer|Broken pipe)"
    r"|(failed to recv, got 0 bytes)",
    re.IGNORECASE,
)
_LATE = re.compile(
    r"gloo[\s\S]*?Timed out waiting (?P<gloo>\d+) ?ms"
    r"|Watchdog caught collective operation timeout[\s\S]*?ran for (?P<nccl>\d+) milliseconds"
)
_ADDRESS = re.compile(r"\[[\w.:%-]+\]:\d+|[\w.:%-]+<\d+>")  # of a peer, as gloo and NCCL write it
HEAD_START = 3.0  # seconds that other ranks wait for rank 0 to print the same message


class PeerFailed(RuntimeError):
    """Another rank failed, and prints the reason itself, where that rank's output is."""

    def __init__(self, rank: int, exit_code: int, reason: str):
        super().__init__(f"rank {rank} failed: {reason}")
        self.rank, self.exit_code, self.reason = rank, exit_code, reason


class NotSavedError(RuntimeError):
    """The last checkpoint of a run could not be written."""

    exit_code = exits.NOT_SAVED


class CollapseError(RuntimeError):
    """An alarm stopped the run (eval.stop_on_alarm)."""

    exit_code = exits.NOT_LEARNING


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def lost_rank(error: BaseException) -> str | None:
    """Say that another rank has ended or came too late, for an error of gloo, NCCL or the store; None for any other.

    A rank that hangs and one that died look alike to NCCL within a machine: its collective times out.
    """
    if not isinstance(error, RuntimeError):  # as torch raises them
        return None
    if late := _LATE.search(str(error)):
        return (
            f"a collective did not complete in {int(late['gloo'] or late['nccl']) / 1000:.0f} s: another rank hangs or "
            "was killed. See the output of the other ranks, the folder hang and the kernel's log (dmesg); the same "
            "command resumes the run"
        )
    if lost := _LOST.search(str(error)):
        how = _ADDRESS.sub("", lost[lost.lastindex or 0]).strip(": ")
        return (
            f"another rank ended without reporting an error ({how}): it was killed, or its machine ran out of memory "
            "or went down. See the output of the other ranks and the kernel's log (dmesg); the same command resumes "
            "the run"
        )
    return None


def print_once(sentence: str) -> None:
    """Print an error on stderr. Under torchrun one rank prints each message: rank 0 if it has it, else the first.

    If the store cannot be reached, every rank prints.
    """
    with _ignore_sigterm():
        if _is_first(sentence):
            with contextlib.suppress(OSError):  # the exit code also reports the failure
                print(sentence, file=sys.stderr, flush=True)
            _report_to_torchrun(sentence)


def print_of_other_machine(error: PeerFailed) -> None:
    """Print on rank 0 the error of a rank of another machine, whose output may be another terminal or file."""
    if is_main_process() and error.rank >= number("LOCAL_WORLD_SIZE", error.rank + 1):
        print_once(f"reca: {error}")
        with _ignore_sigterm():
            time.sleep(HEAD_START + 1)  # the store may end with this rank; that one needs it until it has printed


@contextlib.contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Ignore SIGTERM, which torchrun sends when another rank has failed, until the message is printed."""
    try:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_first(sentence: str) -> bool:
    rank = number("RANK", 0)
    if number("WORLD_SIZE", 1) == 1:
        return True
    key = _key("error", sentence)
    try:
        store = _store()
        if rank != 0:
            with contextlib.suppress(Exception):  # a timeout, whose type depends on torch's version: rank 0 was silent
                store.wait([f"{key}/printed"], timedelta(seconds=HEAD_START))
        mine = store.add(key, 1) == 1
        if mine:
            # Set before printing: ranks that read this key print nothing, and wait for torchrun to end them.
            store.set(f"{key}/printed", "1")
        else:
            time.sleep(1)  # so that the rank that prints ends first
        return mine
    except Exception:  # the store does not exist, or has died with its rank: printing twice is better than never
        return True


class OncePerMessage(logging.Filter):
    """Passes a warning only on the first rank that logs it; if it is repeated, once per repetition."""

    def __init__(self):
        super().__init__()
        self.times: Counter[str] = Counter()
        self.store = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or self.store is False:
            return True
        key = _key("warning", record.getMessage())
        self.times[key] += 1
        try:
            self.store = self.store or _store()
            return self.store.add(f"{key}/{self.times[key]}", 1) == 1
        except Exception:  # as above: printing twice is better than never
            self.store = False
            return True


def _key(what: str, message: str) -> str:
    """Name a message in the store. Those that differ in the addresses of peers only are one: each rank has its own."""
    digest = hashlib.sha256(_ADDRESS.sub("", message).encode(errors="backslashreplace")).hexdigest()[:16]
    return f"reca/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{digest}"


def _store():
    """Connect to the launcher's store. Raises OSError if it does not answer."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection((host, port), HEAD_START).close()  # TCPStore tries twice, and prints C++ frames
    return dist.TCPStore(
        host,
        port,
        is_master=False,
        timeout=timedelta(seconds=HEAD_START),
        wait_for_workers=False,
    )


def _report_to_torchrun(sentence: str) -> None:
    """Add the sentence to torchrun's own failure report, which is printed last."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and is_launched():
        message = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": message}, file)
