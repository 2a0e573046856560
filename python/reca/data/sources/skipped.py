"""Files that a source skips, counted by reason and logged once."""

import functools
import logging

from reca.data.text import one_line
from reca.launcher import is_main_process

log = logging.getLogger("reca")


class Skipped:
    """Counts of skipped files by reason, each with the first file's name as it is printed."""

    def __init__(self, counts: dict[str, int] | None = None, first: dict[str, str] | None = None):
        self.counts, self.first = counts or {}, first or {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, one_line(name))

    def merge(self, counts: dict[str, int], first: dict[str, str]) -> None:
        """Add the counts of another source."""
        for reason, count in counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, first[reason])

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "; ".join(f"{n} {reason} (the first: {self.first[reason]})" for reason, n in self.counts.items())

    def only(self, reason: str) -> "Skipped":
        """Return the count of one reason."""
        return Skipped({reason: self.counts[reason]}, self.first) if reason in self.counts else Skipped()

    def warn(self, where: str) -> None:
        """Log all counts as one warning, if there are any."""
        if self.counts:
            log_once(logging.WARNING, f"{where}: skipped {self}")


@functools.cache
def log_once(level: int, message: str) -> None:
    """Log a message once per process, and on rank 0 only: every rank opens the same sources."""
    if is_main_process():
        log.log(level, "%s", message)
