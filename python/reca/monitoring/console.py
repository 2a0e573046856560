"""Console output of a run, on stderr and by rank 0 only: a progress bar on a terminal, otherwise aligned lines."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from reca import distributed
from reca.monitoring.alarms import CONTRAST, GAP, LOSS, VARIETY

log = logging.getLogger("reca")


class Console:
    """A progress bar that advances with every step, or a printed line for every line of log.jsonl.

    Errors of printing are ignored: stderr may be a file on a full disk, or a pipe without a reader.
    """

    def __init__(self, name: str, steps: int, done: int):
        self.steps, self.end_printed = steps, False
        self.stack = ExitStack()
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.stack.enter_context(logging_redirect_tqdm())  # for the handler of the root logger
            self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, desc=name)

    def write(self, text: str) -> None:
        """Print a line."""
        with suppress(OSError):
            if self.bar is not None:
                tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def step(self, loss: float, images_per_s: float) -> None:
        """Advance the bar, if there is one."""
        if self.bar is None:
            return
        with suppress(OSError):
            self.bar.set_postfix_str(f"loss {loss:.4f}, {images_per_s:.1f} images/s", refresh=False)
            self.bar.update()

    def line(self, step: int, metrics: Mapping[str, float], remaining: float | None) -> None:
        """Print the line of a step, unless there is a bar. remaining: seconds to the end, None if unknown."""
        if self.bar is None:
            self.write(step_line(step, self.steps, metrics, remaining))
        if not self.end_printed and remaining is not None and step < self.steps:
            self.end_printed = True
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + remaining))
            self.write(f"expected end {when}, in {duration(remaining)}")

    def close(self) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
        self.stack.close()


def step_line(step: int, steps: int, metrics: Mapping[str, float], remaining: float | None) -> str:
    """Format the line of a step. Columns are aligned from line to line."""
    width = len(str(steps))
    parts = [
        f"step {step:>{width}}/{steps}",
        f"loss {metrics['loss']:>8.4f}",
        f"images/s {metrics['images_per_s']:>7.1f}",
        f"lr {metrics['lr']:.2e}",
        f"grad norm {metrics['grad_norm']:>8.3g}",
        f"memory {metrics['memory_gib']:>6.2f} GiB",
        f"data wait {metrics['data_wait']:>4.0%}",
    ]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:>5.1%}")
    parts.append(f"ETA {'?' if remaining is None else duration(remaining):>10}")
    return "  ".join(parts)


def evaluation_line(step: int, steps: int, values: Mapping[str, float], seconds: float) -> str:
    """Format the line of an evaluation, with the score of a suite first."""
    parts = [f"evaluation at step {step}/{steps}"]
    for name, score in values.items():
        suite, _, what = name.partition("/")
        if what == "score":
            low, high = (values.get(f"{name}_{end}", float("nan")) for end in ("low", "high"))
            change = f", {values[f'{suite}/change']:+.4g}" if f"{suite}/change" in values else ""
            parts.append(f"{suite} {score:.4g} [{low:.4g}, {high:.4g}]{change}")
    parts += [f"{name} {values[name]:.4g}" for name in (LOSS, GAP, CONTRAST, VARIETY) if name in values]
    return "  ".join([*parts, f"{seconds:.1f} s"])


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss, preceded by the days if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{f'{days}d ' * (days > 0)}{hours}:{minutes:02}:{rest:02}"


@contextmanager
def rank_file(run_dir: Path) -> Iterator[None]:
    """Write the warnings and errors of a rank other than 0 to run_dir/rank_<rank>.log; the terminal gets errors only.

    The first warning creates the file.
    """
    handler = logging.FileHandler(run_dir / f"rank_{distributed.rank()}.log", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with ExitStack() as undone:
        # A message that several ranks log is printed once (errors.py), but is written to the file of every rank.
        filters = list(log.filters)
        for other in logging.getLogger().handlers:
            undone.callback(other.setLevel, other.level)
            other.setLevel(max(other.level, logging.ERROR))
            for one in filters:
                other.addFilter(one)
                undone.callback(other.removeFilter, one)
        for one in filters:
            log.removeFilter(one)
            undone.callback(log.addFilter, one)
        log.addHandler(handler)
        undone.callback(handler.close)
        undone.callback(log.removeHandler, handler)
        yield
