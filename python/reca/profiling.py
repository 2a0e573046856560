"""A window of steps recorded with torch.profiler."""

from pathlib import Path
from types import TracebackType

import torch

from reca import distributed


class ProfileWindow:
    """Records those of the steps of log.profile that are still to be made. The first step of a run is step 1.

    A context manager around the steps; `step` ends each of them. Every rank writes run_dir/trace_rank<rank>.json.
    """

    def __init__(self, window: str | None, done: int, steps: int, run_dir: Path):
        """window: first:last step, or None. done: steps made before. steps: of the run, with whose last it ends."""
        first, last = map(int, (window or "0:0").split(":"))
        last = min(last, steps) if first <= steps else 0
        self.profiler: torch.profiler.profile | None = None
        if last > done:
            wait = max(0, first - 1 - done)
            self.profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=max(0, wait - 1), warmup=min(1, wait), active=last - done - wait, repeat=1
                ),
                on_trace_ready=lambda p: p.export_chrome_trace(str(run_dir / f"trace_rank{distributed.rank()}.json")),
            )

    def __enter__(self) -> "ProfileWindow":
        if self.profiler:
            self.profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler:
            self.profiler.__exit__(kind, error, trace)

    def step(self) -> None:
        if self.profiler:
            self.profiler.step()
