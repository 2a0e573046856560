"""Log of a run: log.jsonl, console output, grids of sample images, TensorBoard and Weights & Biases."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from reca import distributed
from reca.config.recipe import Recipe
from reca.io.image_grid import make_grid, to_pil
from reca.io.jsonl import JsonLines, truncate_after
from reca.monitoring.console import Console, evaluation_line, rank_file
from reca.monitoring.trackers import Trackers

log = logging.getLogger("reca")

LINES_OF_STEPS = ("log.jsonl", "spikes_*.jsonl", "non_finite_*.jsonl")  # truncated to the resumed step


class RunLog:
    """Log of a run on rank 0; other ranks only write their warnings to a file per rank.

    done: number of steps completed before this start. shown: print to the console.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, done: int, shown: bool = True):
        self.run_dir, self.prompts, self.main_process = run_dir, recipe.log.prompts, distributed.rank() == 0
        self.stack = ExitStack()
        self.steps = recipe.train.steps
        self.console: Console | None = None
        if not self.main_process:
            self.stack.enter_context(rank_file(run_dir))
            return
        for path in (path for name in LINES_OF_STEPS for path in run_dir.glob(name)):
            truncate_after(path, done)
        self.lines = JsonLines(run_dir / "log.jsonl")
        self.stack.callback(self.lines.close)
        self.trackers = Trackers(run_dir, done, recipe.log.tensorboard, recipe.log.wandb, asdict(recipe))
        self.stack.callback(self.trackers.close)
        if shown:
            self.console = Console(run_dir.name, recipe.train.steps, done)
            self.stack.callback(self.console.close)

    def print(self, lines: Sequence[str]) -> None:
        """Print lines to the console."""
        if self.console:
            for line in lines:
                self.console.write(line)

    def step(self, loss: float, images_per_s: float) -> None:
        """Show a completed step on the console."""
        if self.console:
            self.console.step(loss, images_per_s)

    def record(self, step: int, values: Mapping[str, float], remaining: float | None = None) -> None:
        """Write the metrics of a step to all outputs. remaining: seconds to the end of the run; None if unknown."""
        if self.main_process:
            self.lines.write({"step": step} | {k: _finite(v) for k, v in values.items()})
            self.trackers.scalars(step, values)
            if self.console:
                self.console.line(step, values, remaining)

    def record_evaluation(self, step: int, values: Mapping[str, float], alarms: Sequence[str], seconds: float) -> None:
        """Write the results of the evaluation after `step` to all outputs. alarms: those that are active."""
        if self.main_process:
            line = {"step": step, "evaluation": True} | {k: _finite(v) for k, v in values.items()}
            self.lines.write(line | {"alarms": list(alarms)})
            self.trackers.scalars(step, values)
            self.print([evaluation_line(step, self.steps, values, seconds)])

    def warn(self, step: int, warning: str) -> None:
        if self.main_process:
            log.warning("step %d: %s", step, warning)
            self.lines.write({"step": step, "warning": warning})

    def sample_images(self, step: int, images: list[Tensor]) -> None:
        """Save a grid of images, one for each prompt in log.prompts."""
        if self.main_process:
            self._save_grid(f"{step:06d}.png", images)
            self.trackers.images(step, "samples", [to_pil(image) for image in images], self.prompts)

    def reconstructions(self, step: int, pairs: list[list[Tensor]]) -> None:
        """Save a two-column grid of (image, reconstruction) pairs."""
        if self.main_process:
            self._save_grid(f"{step:06d}_reconstructions.png", [image for pair in pairs for image in pair], columns=2)
            captions = ["image, reconstruction"] * len(pairs)
            self.trackers.images(step, "reconstructions", [make_grid(pair, columns=2) for pair in pairs], captions)

    def _save_grid(self, name: str, images: list[Tensor], columns: int | None = None) -> None:
        path = self.run_dir / "samples" / name
        try:
            path.parent.mkdir(exist_ok=True)
            make_grid(images, columns).save(path)
        except OSError as error:
            log.warning("%s cannot be written (%s)", path, error)

    def close(self) -> None:
        self.stack.close()


def due(step: int, every: int) -> bool:
    """Tell whether an action with period `every` is due after `step`. every=0 means never."""
    return every > 0 and step % every == 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
