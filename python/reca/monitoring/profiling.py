"""Profiling of a window of steps with torch.profiler."""

from pathlib import Path

import torch

from reca import distributed


def profiler_of(window: str | None, done: int, steps: int, run_dir: Path) -> torch.profiler.profile | None:
    """Return a profiler of the remaining steps of the window log.profile, or None if none remain.

    Steps are counted from 1. Every rank writes run_dir/trace_rank<rank>.json.
    window: "first:last" step, or None. done: steps completed before. steps: of the run, which bounds `last`.
    """
    first, last = map(int, (window or "0:0").split(":"))
    last = min(last, steps) if first <= steps else 0
    if last <= done:
        return None
    wait = max(0, first - 1 - done)
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(
            wait=max(0, wait - 1), warmup=min(1, wait), active=last - done - wait, repeat=1
        ),
        on_trace_ready=lambda p: p.export_chrome_trace(str(run_dir / f"trace_rank{distributed.rank()}.json")),
    )
