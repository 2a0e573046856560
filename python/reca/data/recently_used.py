"""Cache of results that several threads ask for, such as parquet row groups."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class RecentlyUsed:
    """Thread-safe LRU cache of `load`, limited to `budget` bytes but always of at least two results.

    Threads that request the same key share one load. If it fails, all of them get the exception and nothing is cached.
    """

    def __init__(self, load: Callable[[int], Any], size: Callable[[int], int], budget: int):
        self.load, self.size, self.budget = load, size, budget
        self.kept: OrderedDict[int, Future] = OrderedDict()
        self.bytes, self.lock = 0, threading.Lock()

    def __call__(self, key: int) -> Any:
        with self.lock:
            future = self.kept.get(key)
            mine = future is None
            if future is None:
                future = self.kept[key] = Future()
                self.bytes += self.size(key)
                while self.bytes > self.budget and len(self.kept) > 2:
                    oldest, _ = self.kept.popitem(last=False)
                    self.bytes -= self.size(oldest)
            else:
                self.kept.move_to_end(key)
        if mine:
            try:
                future.set_result(self.load(key))
            except BaseException as error:
                with self.lock:
                    if self.kept.get(key) is future:
                        del self.kept[key]
                        self.bytes -= self.size(key)
                future.set_exception(error)
        return future.result()
