"""Steps that make no update because their loss or gradient is not finite."""

import logging
import math
from pathlib import Path

from reca import distributed, exits
from reca.data.batch import Batch
from reca.jsonl import JsonLines

log = logging.getLogger("reca")


class NonFiniteError(RuntimeError):
    """Loss or gradient stayed NaN or infinite."""

    exit_code = exits.NON_FINITE


class SkippedSteps:
    """Decides by its gradient norm, which is the same on all ranks, whether a step makes its update."""

    def __init__(self, run_dir: Path, max_skips: int):
        self.run_dir, self.max_skips = run_dir, max_skips
        self.in_a_row = 0

    def accepts(self, norm: float) -> bool:
        """Tell whether a step with a gradient of this norm may change the parameters."""
        return math.isfinite(norm)

    def record(self, step: int, norm: float, batches: dict[str, list[Batch]], losses: dict[str, float]) -> None:
        """Count a step that was made or skipped, and write down the samples of one that was skipped.

        step: counted from 0. losses: by task.
        Raises NonFiniteError after max_skips non-finite steps in a row.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        dump = {
            "step": step,
            "losses": {task: str(loss) for task, loss in losses.items()},
            "sample_ids": {
                task: [i for batch in list_ if batch.counted for i in batch.sample_ids.tolist()]
                for task, list_ in batches.items()
            },
        }
        lines = JsonLines(self.run_dir / f"non_finite_{distributed.rank()}.jsonl")
        lines.write(dump)
        lines.close()
        log.warning("step %d skipped: loss or gradient is not finite (%s)", step, dump["losses"])
        if self.in_a_row > self.max_skips:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row were not finite; the parameters are those of the last good step. "
                f"The samples are in {self.run_dir}/non_finite_*.jsonl. Lower optim.lr, or use train.precision=fp32"
            )
