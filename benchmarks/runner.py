"""The measurement of all ops on all devices: alternating providers, medians with p20 and p80, peak memory, fp64 errors.

Inputs are random and non-zero. Timed calls rotate through input sets of twice the size of the last-level cache in
total, so that no call finds its inputs in the cache. Three warm-up calls precede the first timed one.
"""

import itertools
import math
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.devices import Ceilings, Device
from benchmarks.rows import BACKWARD, BOTH, BY_SIZE, CEILING, FORWARD, OURS, RESULTS, Row, rounded
from reca.errors import first_line
from reca.hardware import full_memory
from reca_kernels import dispatch

FP32, BF16 = torch.float32, torch.bfloat16

ROUNDS = ((500.0, 25), (5000.0, 9), (20_000.0, 5), (math.inf, 3))  # (limit of a round in ms, number of rounds)
MOST_SETS = 64
SMALL_MS = 0.05  # with a lower bound below this, launch overhead dominates, so CUDA graphs are timed as well


class Provider(NamedTuple):
    """An implementation of an op.

    run         inputs -> results, the differentiable one last
    own_inputs  it overwrites its inputs and therefore gets its own copies
    exact       its results are compared with the case's fp64 formula; False if it draws its own noise
    """

    run: Callable[[SimpleNamespace], tuple[Tensor, ...]]
    own_inputs: bool = False
    exact: bool = True


def shapes(table: dict[str, dict[str, dict]], device: Device) -> Iterator[tuple[str, dict]]:
    """Yield (name, sizes) of an op's shapes: those of the device type, then those for choosing a backend.

    The table of an op has name -> sizes per device type: sizes of the published models for GPUs, reduced ones for a CPU
    with 24 GiB. Those under "sizes" run only on our backends and the reference, and are named BY_SIZE + NAME.
    """
    if missing := [key for key in (device.type, "sizes") if key not in table]:
        raise ValueError(
            f"SHAPES must have the keys cpu, cuda and sizes, each name -> sizes; {missing[0]!r} is missing"
        )
    yield from table[device.type].items()
    for name, sizes in table["sizes"].items():
        yield BY_SIZE + name, sizes


@dataclass
class Case:
    """One op at one shape in one dtype.

    numel        elements of the tensor whose size decides the backend
    inputs       seed -> a set of inputs; `grad`, if there is one, is the upstream gradient
    leaves       names of the inputs that get gradients; `inputs` returns them with requires_grad
    providers    name -> Provider, or a string that says why it cannot run here
    best         the best provider in eager PyTorch
    formula      inputs -> results; with inputs in fp64 it gives the reference for all providers
    bytes,flops  mode -> minimum that any implementation must move or compute. Losses may compute their gradient in the
                 forward pass, so for them only the sum of both passes is known.
    """

    op: str
    shape: str
    dtype: str
    numel: int
    inputs: Callable[[int], SimpleNamespace]
    leaves: tuple[str, ...]
    providers: dict[str, Provider | str]
    best: str
    formula: Callable[[SimpleNamespace], tuple[Tensor, ...]]
    bytes: dict[str, int]
    flops: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.whole not in self.bytes:
            raise ValueError(
                f"{self.op} {self.shape}: bytes must have {self.whole!r}, which a complete call moves at least; it has "
                f"{', '.join(map(repr, self.bytes)) or 'nothing'}"
            )

    @property
    def whole(self) -> str:
        """Return the mode of a complete call."""
        return BOTH if self.leaves else FORWARD


def ours(
    op: str, device: Device, run: Callable[[SimpleNamespace, str], tuple], how: str = "", **options
) -> dict[str, Provider | str]:
    """Return providers "ours: BACKEND" for a device's backends and the reference. run: inputs, backend -> results.

    how: a suffix of the name, for a call with other arguments; the reference is then left out.
    """
    found: dict[str, Provider | str] = {}
    for backend in (*device.backends, *([] if how else ["reference"])):
        reason = dispatch.unusable(op, backend, device.torch_device.type)
        found[f"{OURS}: {backend}{how}"] = reason or Provider(lambda x, b=backend: run(x, b), **options)
    return found


def facts(device: Device, threads: int, command: str) -> dict:
    """Return the columns `Made` of a run."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        **device.facts(),
        "threads": threads,
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
        "date": date.today().isoformat(),
        "command": command,
    }


def _commit() -> str:
    """Return the commit, or RECA_COMMIT if the code is not a git checkout.

    A "+" is appended if files differ from the commit, except results and documentation.
    """
    root = RESULTS.parents[1]

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=root).stdout.strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if top and Path(top).samefile(root):  # not a copy inside another repository
            changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!benchmarks/results", ":!docs")
            return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:
        pass
    return os.environ.get("RECA_COMMIT", "unknown")


def measure(case: Case, device: Device, ceilings: Ceilings, about: dict, rounds: int | None = None) -> list[Row]:
    """Return the rows of every provider: forward, backward and both, or one row that says why it did not run.

    rounds: None chooses the number by the time of a round.
    """
    torch.compiler.reset()  # the recompilation limit is per function, and cases share functions
    sets = _sets(case, device)
    floor = ceilings.floor_ms(case.bytes[case.whole], case.flops.get(case.whole, 0), case.dtype)
    trials: list[_Trial] = []
    able = {name: provider for name, provider in case.providers.items() if not isinstance(provider, str)}
    reasons = {name: provider for name, provider in case.providers.items() if isinstance(provider, str)}
    exact = _exact(case, sets[0]) if any(provider.exact for provider in able.values()) else ""
    for name, provider in able.items():
        try:
            trials += _trials(case, name, provider, device, sets, floor, exact)
        except Exception as error:
            reasons[name] = _failure(error)
        device.free()
    exact = None
    device.free()
    _take_turns(trials, rounds, reasons)
    return [
        Row(case.op, case.shape, name, mode, case.dtype, numel=case.numel, **columns, **about)
        for name in case.providers
        for mode, columns in _columns(case, [t for t in trials if t.name == name], reasons.get(name), ceilings)
    ]


@dataclass
class _Trial:
    """One provider with one clock, and its measurements."""

    name: str
    timing: str
    time: Callable[[], tuple[float, float]]
    peak: float
    error: float | str
    note: str = ""
    times: list[tuple[float, float]] = field(default_factory=list)


def _exact(case: Case, inputs: SimpleNamespace) -> tuple[Tensor, ...] | str:
    """Return the results of the formula in fp64, or the reason if memory is insufficient."""
    try:
        return _results(case, case.formula, _wide(inputs, case.leaves))
    except full_memory.KINDS as error:
        if not full_memory.is_memory_full(error):
            raise
        return f"no error: fp64 formula: {first_line(error)}"


def _trials(case, name, provider, device, sets, floor, exact) -> list[_Trial]:
    if provider.own_inputs:
        sets = [case.inputs(seed) for seed in range(len(sets))]
    found = _results(case, provider.run, sets[0])
    error = _error(found, exact) if provider.exact and not isinstance(exact, str) else ""
    del found
    peak = device.peak_mb(lambda: _results(case, provider.run, sets[0]))  # two calls

    def backward(x: SimpleNamespace, results: tuple) -> tuple:
        return _gradients(case, x, results)

    inputs = itertools.cycle(sets)
    clock = "events" if device.graphs else "clock"
    note = exact if provider.exact and isinstance(exact, str) else ""
    made = [_Trial(name, clock, lambda: device.time(provider.run, backward, inputs), peak, error, note)]
    if device.graphs and floor < SMALL_MS:
        try:
            replay = device.captured(provider.run, backward, sets, floor)
            made.append(_Trial(name, "graph", lambda: replay(provider.run, backward, inputs), peak, error))
        except RuntimeError as refused:
            made[0].note = f"no graph: {first_line(refused)}"
    return made


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {first_line(error)}"


def _take_turns(trials: list[_Trial], rounds: int | None, reasons: dict[str, str]) -> None:
    """Run the trials in rounds. Each pair of rounds starts one trial later, and its second round is reversed, so that
    all trials run equally early and late. A provider that fails is left out from then on, with the reason in `reasons`.
    """
    done = 0
    while trials and (rounds is None or done < rounds):
        start = done // 2 % len(trials)
        order = trials[start:] + trials[:start]
        for trial in order if done % 2 == 0 else reversed(order):
            try:
                trial.times.append(trial.time())
            except Exception as error:
                reasons[trial.name] = _failure(error)
        trials = [trial for trial in trials if trial.name not in reasons]
        done += 1
        if rounds is None:
            took = sum(map(sum, (trial.times[0] for trial in trials)))
            rounds = next(count for limit, count in ROUNDS if took < limit)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def _columns(case: Case, trials: list[_Trial], reason: str | None, ceilings: Ceilings) -> Iterator[tuple[str, dict]]:
    if reason is not None:
        yield case.whole, {"note": reason}
        return
    for trial in trials:
        passes = {FORWARD: [f for f, _ in trial.times]}
        if case.leaves:
            passes |= {BACKWARD: [b for _, b in trial.times], BOTH: [f + b for f, b in trial.times]}
        for mode, times in passes.items():
            p20, p50, p80 = percentiles(times)
            columns = {"timing": trial.timing, "ms_p50": rounded(p50), "ms_p20": rounded(p20), "ms_p80": rounded(p80)}
            if moved := case.bytes.get(mode):
                rate = moved / p50 / 1e6
                columns |= {"bytes": moved, "gb_per_s": rounded(rate)}
                columns |= {"percent_copy": rounded(100 * rate / ceilings.copy)}
            if flops := case.flops.get(mode):
                rate, most = flops / p50 / 1e9, ceilings.gemm[case.dtype]
                columns |= {"flops": flops, "tflop_per_s": rounded(rate), "percent_gemm": rounded(100 * rate / most)}
            if mode == case.whole:
                columns |= {"peak_mb": round(trial.peak, 2), "relative_error": trial.error, "note": trial.note}
            yield mode, columns


def ceiling_rows(ceilings: Ceilings, about: dict) -> list[Row]:
    rows = [Row(CEILING, "copy", "torch", FORWARD, "float32", gb_per_s=rounded(ceilings.copy), **about)]
    return rows + [
        Row(CEILING, "matrix product", "torch", FORWARD, dtype, tflop_per_s=rounded(rate), **about)
        for dtype, rate in ceilings.gemm.items()
    ]


def _sets(case: Case, device: Device) -> list[SimpleNamespace]:
    sets = [case.inputs(0)]
    size = sum(x.numel() * x.element_size() for x in _tensors(sets[0]))
    count = min(MOST_SETS, -(-2 * device.cache_bytes() // max(size, 1)))
    return sets + [case.inputs(seed) for seed in range(1, count)]


def _tensors(inputs: SimpleNamespace) -> Iterator[Tensor]:
    for value in vars(inputs).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, Tensor):
                yield item


def _wide(inputs: SimpleNamespace, leaves: tuple[str, ...]) -> SimpleNamespace:
    """Return the inputs with every floating tensor in fp64."""

    def widen(value: Any) -> Any:
        if isinstance(value, list):
            return [widen(item) for item in value]
        return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value

    wide = SimpleNamespace(**{name: widen(value) for name, value in vars(inputs).items()})
    for name in leaves:
        getattr(wide, name).requires_grad_()
    return wide


def _gradients(case: Case, inputs: SimpleNamespace, results: tuple) -> tuple[Tensor, ...]:
    if not case.leaves:
        return ()
    leaves, upstream = [getattr(inputs, name) for name in case.leaves], getattr(inputs, "grad", None)
    if upstream is None and results[-1].numel() != 1:
        raise ValueError(f"the last result has shape {list(results[-1].shape)}, and inputs no `grad` of that shape")
    # Contiguous, as the preceding matmuls of a model need them: the gradient of cat is a view.
    return tuple(g.contiguous() for g in torch.autograd.grad(results[-1], leaves, upstream))


def _results(case: Case, run: Callable, inputs: SimpleNamespace) -> tuple[Tensor, ...]:
    results = run(inputs)
    return *(r.detach() for r in results), *_gradients(case, inputs, results)


def _error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the largest relative Frobenius error over results and gradients, computed in parts to save memory."""
    errors = []
    for a, b in zip(found, exact, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"a result has shape {list(a.shape)}, expected {list(b.shape)}")
        off = size = 0.0
        for part, right in zip(a.reshape(-1).split(1 << 26), b.reshape(-1).split(1 << 26), strict=True):
            off += float((part.double() - right).square().sum())
            size += float(right.square().sum())
        errors.append((off / max(size, 1e-60)) ** 0.5)
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    return float(f"{worst:.2e}")


def show(rows: list[Row], best: str) -> str:
    """Return a table of one case, with every provider's time as a multiple of our fastest backend's."""
    lines = [f"{rows[0].op} {rows[0].shape} {rows[0].dtype}"]
    whole = rows[0].mode if all(row.mode == FORWARD for row in rows) else BOTH
    for timing in dict.fromkeys(row.timing for row in rows):
        group = [row for row in rows if row.timing == timing and row.mode == whole]
        base = min((row.ms_p50 for row in group if row.provider.startswith(OURS) and row.ms_p50 != ""), default=None)
        for row in group:
            if row.ms_p50 == "":
                lines.append(f"  {row.provider:<26} {row.note}")
                continue
            rates = f"  {row.gb_per_s:8.4g} GB/s {row.percent_copy:5.1f} %" if row.gb_per_s != "" else ""
            if row.tflop_per_s != "":
                rates += f" {row.tflop_per_s:8.4g} TFLOP/s {row.percent_gemm:5.1f} %"
            ratio = f"{row.ms_p50 / base:6.2f} x" if base else ""
            error = "-" if row.relative_error == "" else row.relative_error
            lines.append(
                f"  {row.provider:<26} {row.ms_p50:9.4g} ms [{row.ms_p20:.4g}, {row.ms_p80:.4g}] {timing}{rates}"
                f"  peak {row.peak_mb:8.1f} MB  error {error:>8}  {ratio}"
                + (" (best eager)" if row.provider == best else "")
                + (f"  {row.note}" if row.note else "")
            )
    return "\n".join(lines)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
