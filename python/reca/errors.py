"""Messages of errors: their first line, and printed once, however many ranks raise them."""

import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

HEAD_START = 3.0  # seconds that other ranks wait for rank 0 to print the same


class PeerFailed(RuntimeError):
    """Another rank has failed, and prints the reason itself."""

    def __init__(self, rank: int, exit_code: int, reason: str):
        super().__init__(f"rank {rank} failed: {reason}")
        self.exit_code, self.reason = exit_code, reason


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def print_once(sentence: str) -> None:
    """Print an error on stderr. Under torchrun only one rank prints it: rank 0 if it has this message, else the first.

    An error of one rank is printed by that rank. Ranks that cannot reach the store all print.
    """
    with _ignore_sigterm():
        if _is_first(sentence):
            with contextlib.suppress(OSError):  # the exit code says it, too
                print(sentence, file=sys.stderr, flush=True)
            _report_to_torchrun(sentence)


@contextlib.contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Ignore SIGTERM, by which torchrun ends this rank when another has failed, until the message is printed."""
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
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    key = _key("error", sentence)
    try:
        store = _store()
        if rank != 0:
            with contextlib.suppress(Exception):  # of another name in every version of torch: rank 0 has not printed it
                store.wait([f"{key}/printed"], timedelta(seconds=HEAD_START))
        mine = store.add(key, 1) == 1
        if mine:
            # Set before it is printed: a rank that reads this key prints nothing, and waits for torchrun to end it.
            store.set(f"{key}/printed", "1")
        else:
            time.sleep(1)  # the rank that prints it is the first to end
        return mine
    except Exception:  # no store, or one that is gone with its rank: twice is better than never
        return True


class OncePerMessage(logging.Filter):
    """Lets a warning pass on the first rank that has it; of one that comes again, each time once."""

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
        except Exception:  # as for errors: twice is better than never
            self.store = False
            return True


def _key(what: str, message: str) -> str:
    digest = hashlib.sha256(message.encode(errors="backslashreplace")).hexdigest()[:16]
    return f"reca/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{digest}"


def _store():
    import torch.distributed as dist

    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=HEAD_START),
        wait_for_workers=False,
    )


def _report_to_torchrun(sentence: str) -> None:
    """Make torchrun's own report of the failure, which comes last, end in the sentence."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and "RANK" in os.environ:
        message = {"message": sentence, "extraInfo": {"timestamp": int(time.time())}}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": message}, file)
