"""Quiet libraries while they are imported: the first import of a process that does nothing but import them."""

import signal

from reca.workers import quiet

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
quiet()
