"""Which checkpoints of a run are kept."""

from pathlib import Path
from typing import NamedTuple


class Keep(NamedTuple):
    """The rule of checkpoint.keep and checkpoint.keep_every.

    latest    number of latest checkpoints to keep; 0: all
    every     also keep those whose step is a multiple of this; 0: none
    """

    latest: int
    every: int = 0

    def superseded(self, complete: list[Path]) -> list[Path]:
        """List the checkpoints to remove. complete: all complete ones, oldest first."""
        if not self.latest:
            return []
        return [path for path in complete[: -self.latest] if not self.every or int(path.name) % self.every]

    def most(self, steps: int, interval: int) -> int:
        """Return the largest number of checkpoints on disk in a run of `steps` that saves every `interval` steps.

        A new one is completed before the oldest is removed. `every` is a multiple of `interval`. interval 0: save only
        at the end.
        """
        saves = -(-steps // interval) if interval else 1
        if not self.latest or saves <= self.latest + 1:
            return saves
        oldest = (saves - self.latest) * interval  # step of the oldest of the latest ones, including the new one
        return self.latest + 1 + ((oldest - 1) // self.every if self.every else 0)
