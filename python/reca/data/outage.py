"""Waiting for remote storage that answers nothing."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from reca.data.errors import DataError, Outage
from reca.data.text import one_line

R = TypeVar("R")
PATIENCE = 240.0  # seconds until the run ends: less than log.hang_seconds, so that this error is the one reported
PAUSE = 1.0  # seconds before the first repetition; doubles with each further one
LONGEST = 10.0

log = logging.getLogger("reca")
_lock = threading.Lock()
_announced = -math.inf  # when a warning was logged last


def outlast(read: Callable[[], R], closed: threading.Event) -> R:
    """Return `read()`, and repeat it while the storage answers nothing.

    closed: ends the waiting.
    Raises DataError before a further read could last beyond PATIENCE seconds: replacing samples that are sound would
    change the data of the run.
    """
    began, pause = time.monotonic(), PAUSE
    while True:
        asked = time.monotonic()
        try:
            return read()
        except Outage as error:
            now, reason = time.monotonic(), one_line(error.args[0])
            if now + (now - asked) >= began + PATIENCE or closed.is_set():
                raise DataError(
                    f"remote storage could not be read for {now - began:.0f} s: {reason}. No sample was counted as "
                    "bad. Check the network, the storage and its credentials, then give the same command again: a run "
                    "resumes from its last checkpoint"
                ) from error
            _announce(now, reason)
        closed.wait(pause)
        pause = min(2 * pause, LONGEST)


def _announce(now: float, reason: str) -> None:
    """Log a warning, once for all reads that wait for one outage."""
    global _announced
    with _lock:
        if now < _announced + PATIENCE:
            return
        _announced = now
    log.warning("Remote storage cannot be read; waiting up to %.0f s for it: %s", PATIENCE, reason)
