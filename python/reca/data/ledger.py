"""The record of unreadable samples."""

import json
import threading
from pathlib import Path

from reca.data.sources import DataError


class Ledger:
    """Counts bad samples, writes each once to a JSONL file, and stops the run when there are too many."""

    def __init__(self, path: Path | None, size: int, max_fraction: float):
        self.path, self.size, self.max_fraction = path, size, max_fraction
        self.bad: dict[str, str] = {}
        self.lock = threading.Lock()

    def add(self, key: str, size: int, reason: str) -> None:
        """Raises DataError when more than the allowed share of all samples is bad."""
        with self.lock:
            if key in self.bad:
                return
            self.bad[key] = reason
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key, "bytes": size, "reason": reason}) + "\n")
            if len(self.bad) > self.max_fraction * self.size:
                first = "; ".join(f"{key} ({reason})" for key, reason in list(self.bad.items())[:3])
                raise DataError(
                    f"{len(self.bad)} of {self.size} pictures are unreadable, more than data.max_bad_fraction="
                    f"{self.max_fraction}: {first}. All are in {self.path or 'the ledger'}; repair or remove them, or "
                    "raise data.max_bad_fraction"
                )
