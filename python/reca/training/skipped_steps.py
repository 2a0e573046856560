"""Skipping of steps whose loss or gradient is not finite, or whose gradient norm is an outlier."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reca import distributed, exits
from reca.config.recipe import TrainConfig
from reca.data.batch import Batch
from reca.io.jsonl import JsonLines

log = logging.getLogger("reca")

SMALLEST_SPREAD = 0.01  # lower bound of std / mean, so that small deviations of nearly constant norms are no spikes


class NonFiniteError(RuntimeError):
    """Loss or gradient was NaN or infinite for more than train.max_skips steps in a row."""

    exit_code = exits.NON_FINITE


class SkippedSteps:
    """Decides from the gradient norm whether a step updates the parameters. The decision is the same on all ranks.

    With train.skip_spikes = z, a step is skipped if its norm is more than z standard deviations above the mean of the
    last train.spike_window finite norms, once the window is half full. A skipped norm enters the window clipped to the
    limit, so that an outlier does not mask the next one and a lasting rise is accepted after some steps.

    total     number of skipped steps since the run began, non-finite ones and spikes
    in_a_row  number of non-finite steps since the last finite one
    """

    def __init__(self, run_dir: Path, config: TrainConfig):
        self.run_dir, self.config = run_dir, config
        self.norms: deque[float] = deque(maxlen=config.spike_window)
        self.total, self.in_a_row = 0, 0
        self.reason = ""  # why the last step was skipped; empty when it was not

    def accepts(self, norm: float) -> bool:
        """Tell whether a step with this gradient norm may update the parameters. Sets `reason`."""
        self.reason = ""
        if not math.isfinite(norm):
            self.reason = "loss or gradient is not finite"
        elif self.config.skip_spikes is not None:
            limit = self._limit()
            # Norms may differ between ranks by rounding; all ranks must take the same decision.
            if distributed.any_rank(norm > limit):
                self.reason = f"gradient norm {norm:.4g} is {self._z(norm):.1f} standard deviations above the mean"
            self.norms.append(min(norm, limit))
        return not self.reason

    def record(self, step: int, norm: float, batches: dict[str, list[Batch]], losses: dict[str, float]) -> None:
        """Count the step that was last passed to `accepts`; if it was skipped, write its samples to a file.

        step: counted from 1, as in log.jsonl. losses: by task.
        Raises NonFiniteError after more than train.max_skips non-finite steps in a row.
        """
        finite = math.isfinite(norm)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not self.reason:
            return
        self.total += 1
        dump = {
            "step": step,
            "grad_norm": norm if finite else str(norm),
            "losses": {task: str(loss) for task, loss in losses.items()},
            "sample_ids": {
                task: [i for batch in list_ if batch.counted for i in batch.sample_ids.tolist()]
                for task, list_ in batches.items()
            },
        }
        path = self.run_dir / f"{'spikes' if finite else 'non_finite'}_{distributed.rank()}.jsonl"
        try:
            lines = JsonLines(path)
        except OSError as error:  # a full disk may have no room for another file
            log.warning("%s cannot be written (%s)", path, error.strerror)
        else:
            lines.write(dump)
            lines.close()
        log.warning("step %d skipped: %s (%s); %d so far", step, self.reason, dump["losses"], self.total)
        if self.in_a_row > self.config.max_skips:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row were not finite; the parameters are those of the last finite step. "
                f"The samples are in {self.run_dir}/non_finite_*.jsonl. Lower optim.lr, or use train.precision=fp32, "
                "in another run_dir. If this run has a checkpoint, "
                f"train.init_from={self.run_dir} takes over its weights"
            )

    def state(self) -> dict[str, Any]:
        """Return the state for checkpoints: JSON-able, without rounding."""
        return {"norms": list(self.norms), "total": self.total, "in_a_row": self.in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.norms.extend(state["norms"])
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    def _limit(self) -> float:
        """Return the norm above which a step is skipped; infinity while the window is less than half full."""
        if self.config.skip_spikes is None or 2 * len(self.norms) < self.config.spike_window:
            return math.inf
        mean, spread = self._mean_and_spread()
        return mean + self.config.skip_spikes * spread

    def _z(self, norm: float) -> float:
        mean, spread = self._mean_and_spread()
        return (norm - mean) / spread if spread else 0.0

    def _mean_and_spread(self) -> tuple[float, float]:
        mean = statistics.fmean(self.norms)
        return mean, max(statistics.pstdev(self.norms, mean), SMALLEST_SPREAD * mean)
