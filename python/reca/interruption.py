"""Signals that end a run early: between two steps, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from reca import exits

# SIGUSR1 is what SLURM may be told to send ahead of its time limit; SIGHUP comes when a terminal goes.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interruption:
    """What a run is told by SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP. A second signal of the same kind ends the process.

    asked    a signal has come
    waits    the run looks at `asked` between steps. Until it does there is nothing to save: a signal ends it at once
    """

    def __init__(self) -> None:
        self.asked, self.waits = False, False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside of this context. Raises SystemExit(75) there while `waits` is False.

        Only the main thread of a process can listen: in another one, as of a server, signals do what they did. SIGHUP
        stays ignored under nohup.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _take(self, number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.asked = True
        if not self.waits:
            raise SystemExit(exits.INTERRUPTED)
