"""Row groups of parquet files, read one at a time and kept while they are used."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class RecentlyUsed:
    """Keeps the results of `load` for the keys used last, up to a number of bytes, and at least two of them.

    Threads that ask for one key wait for one load. What fails is not kept, and every one of them gets the exception.
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
