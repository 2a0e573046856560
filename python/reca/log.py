"""Log of a run: a progress bar, log.jsonl, TensorBoard and grids of sample images."""

import contextlib
import logging
import math
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from reca.image_grid import make_grid
from reca.jsonl import JsonLines, truncate_after

log = logging.getLogger("reca")


class RunLog:
    """Log of a run on rank 0; on other ranks it does nothing."""

    def __init__(self, run_dir: Path, steps: int, done: int, tensorboard: bool, main_process: bool, bar: bool = True):
        self.run_dir, self.main_process, self.board = run_dir, main_process, None
        self.bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not (main_process and bar),
            desc=run_dir.name,
        )
        if not main_process:
            return
        truncate_after(run_dir / "log.jsonl", done)
        self.lines = JsonLines(run_dir / "log.jsonl")
        self.redirect = logging_redirect_tqdm()  # of the root logger, whose handler prints
        self.redirect.__enter__()
        if tensorboard:
            self.board = _tensorboard(run_dir, done)

    def progress(self, loss: float, images_per_s: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}, {images_per_s:.1f} images/s", refresh=False)
        self.bar.update()

    def record(self, step: int, values: dict[str, float]) -> None:
        if not self.main_process:
            return
        self.lines.write({"step": step} | {k: _finite(v) for k, v in values.items()})
        if self.board:
            try:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
            except OSError as error:
                log.warning("TensorBoard's file cannot be written (%s): it ends here", error)
                self.board = None

    def warn(self, step: int, warning: str) -> None:
        if self.main_process:
            log.warning("step %d: %s", step, warning)
            self.lines.write({"step": step, "warning": warning})

    def sample_images(self, step: int, images: list[Tensor]) -> None:
        if self.main_process:
            path = self.run_dir / "samples" / f"{step:06d}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                make_grid(images).save(path)
            except OSError as error:
                log.warning("%s cannot be written (%s)", path, error)

    def close(self) -> None:
        self.bar.close()
        if self.main_process:
            self.redirect.__exit__(None, None, None)
            self.lines.close()
            if self.board:
                with contextlib.suppress(OSError):  # a full disk
                    self.board.close()


def due(step: int, every: int) -> bool:
    """Tell whether something that happens every so many steps happens after `step`; 0 is never."""
    return every > 0 and step % every == 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _tensorboard(run_dir: Path, done: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("tensorboard is not installed (pip install 'reca[log]'): logging to log.jsonl only")
        return None
    try:
        return SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1 if done else None)
    except OSError as error:
        log.warning("TensorBoard's file cannot be written (%s): logging to log.jsonl only", error)
        return None
