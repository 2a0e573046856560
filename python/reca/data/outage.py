"""Waiting for remote storage that answers nothing."""

import logging
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


def outlast(read: Callable[[], R], closed: threading.Event) -> R:
    """Return `read()`, and repeat it while the storage answers nothing.

    closed: ends the waiting.
    Raises DataError after PATIENCE seconds: replacing samples that are sound would change the data of the run.
    """
    began, pause = time.monotonic(), PAUSE
    while True:
        try:
            return read()
        except Outage as error:
            waited, reason = time.monotonic() - began, one_line(error.args[0])
            if waited >= PATIENCE or closed.is_set():
                raise DataError(
                    f"remote storage has answered no request for {waited:.0f} s: {reason}. No sample was counted as "
                    "bad. Check the network and the storage, then give the same command again: a run resumes from its "
                    "last checkpoint"
                ) from error
            if pause == PAUSE:
                log.warning("Remote storage does not answer: waiting up to %.0f s for it: %s", PATIENCE, reason)
        closed.wait(pause)
        pause = min(2 * pause, LONGEST)
