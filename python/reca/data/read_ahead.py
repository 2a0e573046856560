"""Bounded prefetching with threads."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 64  # of short reads: they wait for round trips to a server, not for a core
GROUP = 64  # short reads of a thread at a time, so that they cost no more than in a loop where the disk is local


def read_ahead(
    read: Callable[[T], R], items: Iterable[T], workers: int, closed: threading.Event | None = None
) -> Iterator[R]:
    """Yield `read(item)` of every item, in order, with about four results per thread in memory.

    closed: set at the end, also after an error or Ctrl-C, for reads that would wait longer.
    """
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
        if closed:
            closed.set()
        pool.shutdown(cancel_futures=True)


def read_many(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `read(item)` of every item, in order, for many reads that are as short as asking for the size of a file."""
    rest = iter(items)
    groups = iter(lambda: list(itertools.islice(rest, GROUP)), [])
    if len(first := next(groups, [])) < GROUP:
        yield from map(read, first)
        return
    for found in read_ahead(lambda group: list(map(read, group)), itertools.chain([first], groups), THREADS):
        yield from found
