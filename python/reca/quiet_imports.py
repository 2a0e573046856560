"""Quiet libraries while they are imported: the first import of a process that does nothing but import them."""

from reca.workers import quiet

quiet()
