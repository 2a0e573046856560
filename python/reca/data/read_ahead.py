"""Bounded prefetching with threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(read: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `read(item)` of every item, in order, with about four results per thread in memory."""
    workers = max(1, workers)
    pool = ThreadPoolExecutor(workers)
    try:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(read, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:  # after an error, what waits is not read
        pool.shutdown(cancel_futures=True)
