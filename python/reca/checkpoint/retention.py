"""Which checkpoints of a run stay on the disk."""

from pathlib import Path
from typing import NamedTuple


class Keep(NamedTuple):
    """The rule of checkpoint.keep and checkpoint.keep_every.

    latest    how many of the latest ones stay; 0: all
    every     those whose step is a multiple of it stay, too; 0: none
    """

    latest: int
    every: int = 0

    def superseded(self, complete: list[Path]) -> list[Path]:
        """List those of the complete checkpoints, oldest first, that need not stay."""
        if not self.latest:
            return []
        return [path for path in complete[: -self.latest] if not self.every or int(path.name) % self.every]

    def most(self, steps: int, interval: int) -> int:
        """Count the checkpoints that lie on the disk at most in a run of `steps` that saves every `interval` steps.

        A new one is complete before the oldest goes. `every` is a multiple of `interval`; 0 saves at the end only.
        """
        saves = -(-steps // interval) if interval else 1
        if not self.latest or saves <= self.latest + 1:
            return saves
        oldest = (saves - self.latest) * interval  # of the latest ones, with the new one
        return self.latest + 1 + ((oldest - 1) // self.every if self.every else 0)
