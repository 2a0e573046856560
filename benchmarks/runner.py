"""One protocol for all ops: providers take turns, medians with p20 and p80, peak memory, error against fp64."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no lines of the profiler's own between the tables

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
WARMUPS, ROUNDS = 2, 9
SLOW, SLOW_ROUNDS = 5.0, 5  # a round of all providers that takes more seconds is repeated less


@dataclass
class Case:
    """One op at one shape in one dtype.

    providers   name -> function without arguments that runs forward and backward once and returns (loss or output,
                gradients), or a string: why it cannot run here
    exact       provider -> the same in fp64, for its error. One that draws noise of its own has none.
    bytes       what any implementation must read and write at least
    """

    op: str
    shape: str
    dtype: str
    providers: dict[str, Callable[[], tuple[Tensor, ...]] | str]
    exact: dict[str, Callable[[], tuple[Tensor, ...]]]
    bytes: int


@dataclass
class Row:
    op: str
    shape: str
    provider: str
    mode: str
    dtype: str
    ms_p50: float | str
    ms_p20: float | str
    ms_p80: float | str
    gb_per_s: float | str
    peak_mb: float | str
    relative_error: float | str
    note: str
    device: str
    threads: int
    torch: str
    commit: str
    date: str


COLUMNS = [f.name for f in fields(Row)]


def measure(case: Case, threads: int) -> list[Row]:
    """A row per provider. Providers run in turn within every round, so a slow moment of the machine meets them all."""
    able = {name: run for name, run in case.providers.items() if callable(run)}
    errors = _errors(case, able)
    peaks = {name: _peak_mb(run) for name, run in able.items()}
    for _ in range(WARMUPS):
        began = time.perf_counter()
        for run in able.values():
            run()
        slow = time.perf_counter() - began > SLOW
    times: dict[str, list[float]] = {name: [] for name in able}
    names = list(able)
    for i in range(SLOW_ROUNDS if slow else ROUNDS):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            able[name]()
            times[name].append(1e3 * (time.perf_counter() - began))
    rows = []
    for name, run in case.providers.items():
        common = {"op": case.op, "shape": case.shape, "provider": name, "mode": "forward+backward", "dtype": case.dtype}
        if not callable(run):
            rows.append(Row(**common, ms_p50="", ms_p20="", ms_p80="", gb_per_s="", peak_mb="", relative_error="", note=run, **_machine(threads)))
            continue
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        rows.append(
            Row(
                **common,
                ms_p50=round(p50, 3),
                ms_p20=round(p20, 3),
                ms_p80=round(p80, 3),
                gb_per_s=round(case.bytes / p50 / 1e6, 2),
                peak_mb=round(peaks[name], 1),
                relative_error=float(f"{errors[name]:.2e}") if name in errors else "",
                note="",
                **_machine(threads),
            )
        )
    return rows


def show(rows: list[Row], best: str) -> str:
    """A table of one case, with every provider's time as a multiple of ours."""
    ours = next(row for row in rows if row.provider == "ours")
    lines = [f"{ours.op} {ours.shape} {ours.dtype}"]
    for row in rows:
        if row.note:
            lines.append(f"  {row.provider:<22} {row.note}")
            continue
        ratio = f"{row.ms_p50 / ours.ms_p50:5.2f} x" + (" (best eager)" if row.provider == best else "")
        lines.append(
            f"  {row.provider:<22} {row.ms_p50:9.2f} ms [{row.ms_p20:.2f}, {row.ms_p80:.2f}]  peak {row.peak_mb:8.1f} MB"
            f"  error {'-' if row.relative_error == '' else row.relative_error:>8}  {ratio}"
        )
    return "\n".join(lines)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """(loss, gradient of every leaf)."""
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _errors(case: Case, able: dict[str, Callable]) -> dict[str, float]:
    """Largest relative Frobenius error over a provider's results."""
    made: dict[Callable, tuple[Tensor, ...]] = {}
    found = {}
    for name, exact in case.exact.items():
        made[exact] = made.get(exact) or exact()
        pairs = zip(able[name](), made[exact], strict=True)
        found[name] = max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)
    return found


def _peak_mb(run: Callable) -> float:
    """Largest sum of live allocations while it runs, above what lived before, in 1e6 bytes."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = run()
        del result
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 1e6


def _machine(threads: int) -> dict:
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    return {"device": name, "threads": threads, "torch": torch.__version__, "commit": commit, "date": date.today().isoformat()}


def as_dict(row: Row) -> dict:
    return asdict(row)
