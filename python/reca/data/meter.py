"""Throughput of work that is shared by several threads."""

import contextlib
import threading
import time
from collections.abc import Iterator


class Meter:
    """Counter of work items and the time that threads spend on them. `with meter:` is one item."""

    def __init__(self) -> None:
        self.lock, self.local = threading.Lock(), threading.local()
        self.pieces, self.seconds = 0, 0.0

    def __enter__(self) -> None:
        self.local.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._add(1, time.perf_counter() - self.local.started)

    @contextlib.contextmanager
    def more_time(self, threads: int) -> Iterator[None]:
        """Add time to items that are counted elsewhere. threads: number of threads that wait meanwhile."""
        started = time.perf_counter()
        yield
        self._add(0, threads * (time.perf_counter() - started))

    def _add(self, pieces: int, seconds: float) -> None:
        with self.lock:
            self.pieces += pieces
            self.seconds += seconds

    def rate(self) -> float:
        """Return the items per second and thread since the last call; 0 if there were none."""
        with self.lock:
            rate = self.pieces / self.seconds if self.seconds else 0.0
            self.pieces, self.seconds = 0, 0.0
        return rate
