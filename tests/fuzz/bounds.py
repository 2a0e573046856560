"""What no input may do: hang, or take memory without end. How many inputs were tried."""

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings

SECONDS = 5
MEMORY = 2**30
COUNTS: Counter[str] = Counter()


class Hang(BaseException):
    """An input took more than SECONDS of CPU time. No `except Exception` may swallow it."""


@contextlib.contextmanager
def counted(what: str) -> Iterator[None]:
    """Count one input of this name, and raise Hang when it takes too long."""

    def hang(*_):
        raise Hang(f"more than {SECONDS} s of CPU time")

    COUNTS[what] += 1
    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fewer(share: float) -> settings:
    """For tests whose inputs take long: this share of the profile's examples. A decorator beside @given."""
    return settings(max_examples=max(20, round(share * settings.default.max_examples)))


def resident() -> int:
    """Bytes of this process in memory; 0 where /proc is not there."""
    return _status("VmRSS")


def peak() -> int:
    """The most that they have been."""
    return _status("VmHWM")


def _status(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
