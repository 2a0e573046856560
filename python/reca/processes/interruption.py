"""Signals that end a run early, between two steps and with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from reca import exits

# SLURM can send SIGUSR1 ahead of its time limit; SIGHUP comes when a terminal closes.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Interruption:
    """SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP during a run. A second signal of the same kind ends the process.

    requested  a signal has arrived
    deferred   the run checks `requested` between steps; while False there is nothing to save, and a signal ends it
    """

    def __init__(self) -> None:
        self.requested, self.deferred = False, False

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals inside this context. Raises SystemExit(75) there while `deferred` is False.

        Only the main thread can handle signals: in another thread, such as a server's, this changes nothing.
        SIGHUP stays ignored under nohup.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python

    def _on_signal(self, number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        if not self.deferred:
            raise SystemExit(exits.INTERRUPTED)
