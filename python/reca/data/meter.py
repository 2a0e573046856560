"""How fast work is done that many threads share."""

import threading
import time


class Meter:
    """Counts pieces of work and the time that threads spend in them. `with meter:` is one piece."""

    def __init__(self) -> None:
        self.lock, self.local = threading.Lock(), threading.local()
        self.pieces, self.seconds = 0, 0.0

    def __enter__(self) -> None:
        self.local.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.local.started
        with self.lock:
            self.pieces += 1
            self.seconds += took

    def rate(self) -> float:
        """Return the pieces a second of one thread since the last call; 0 when there were none."""
        with self.lock:
            rate = self.pieces / self.seconds if self.seconds else 0.0
            self.pieces, self.seconds = 0, 0.0
        return rate
