"""Silence library warnings on import. First preload of the fork server, which only imports modules and forks."""

import signal

from reca.processes.workers import quiet

signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit on Ctrl-C without a traceback
quiet()
