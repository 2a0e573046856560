"""Choose the backend that runs an op, and explain the choice.

An op is a folder of this package, and a backend is a file in it: reference.py, the definition in plain PyTorch, which
every op has; native.py, which launches the C++ kernels (backend `cpu`) and the CUDA kernels (`cuda`), or cpu.py, if the
op has no CUDA kernels; triton.py. The protocol `Kernels` in <op>/kernels.py lists the functions of native.py, cpu.py
and triton.py. A folder with none of these files is not dispatched.
"""

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca_kernels import compiling, native

# Backend -> the modules of an op's folder that may implement it, of which an op has one at most.
MODULES = {"reference": ("reference",), "cpu": ("native", "cpu"), "cuda": ("native",), "triton": ("triton",)}
BACKENDS = tuple(MODULES)
RUNS_ON = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # type of device; the reference runs on any
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

PACKAGE = Path(__file__).parent


def _modules(op: str, backend: str) -> list[str]:
    return [name for name in MODULES[backend] if (PACKAGE / op / f"{name}.py").exists()]


def has_backend(op: str, backend: str) -> bool:
    return bool(_modules(op, backend))


OPS = tuple(
    sorted(
        folder.name
        for folder in PACKAGE.iterdir()
        if any(has_backend(folder.name, backend) for backend in BACKENDS if backend != "reference")
    )
)

# Order of preference where nothing was measured. If none of these can run an op, the reference does.
ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Measured rules, written by `python -m benchmarks.dispatch` from benchmarks/results.
TABLE = Path(__file__).with_name("dispatch_table.json")


Entry = dict[str, Any]  # one entry of the table


class Rule(NamedTuple):
    """Use `backend` for these dtypes when the op's main tensor has min_numel <= elements < max_numel."""

    backend: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    min_numel: int = 0
    max_numel: int | None = None


def read_table(path: Path = TABLE) -> dict[tuple[str, str], list[Entry]]:
    """Read (op, device type) -> entries: dtype, rules, and the command, date, device and versions of the benchmark."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in json.loads(path.read_text())["entries"]:
        found.setdefault((entry["op"], entry["device"]), []).append(entry)
    return found


def _rules(entries: list[Entry], device: str) -> tuple[Rule, ...]:
    """Return the measured rules, then the default order for what no measurement covers."""
    measured = [
        Rule(rule["backend"], (getattr(torch, entry["dtype"]),), rule["min_numel"], rule["max_numel"])
        for entry in entries
        for rule in entry["rules"]
    ]
    return *measured, *map(Rule, ORDER[device])


MEASURED = read_table()
# (op, device type) -> rules. The first that matches and whose backend can run here is used.
RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    (op, device): _rules(MEASURED.get((op, device), []), device) for op in OPS for device in ORDER
}


_used: str | None = None


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op on `backend` inside this context, in all threads. Overrides RECA_BACKEND and the table.

    As with RECA_BACKEND, ops on a type of device that the backend is not for are chosen by the table, see `choose`.
    """
    global _used
    before, _used = _used, backend
    try:
        yield
    finally:
        _used = before


_gpu_assumed = False


@contextmanager
def assume_gpu() -> Iterator[None]:
    """Choose inside this context, for fake tensors, as if they were on a GPU.

    A machine without a GPU is assumed to have one that can run every backend.
    """
    global _gpu_assumed
    before, _gpu_assumed = _gpu_assumed, True
    try:
        yield
    finally:
        _gpu_assumed = before


def choose(
    op: str,
    tensor: Tensor,
    backend: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    numel: int | None = None,
) -> str:
    """Return the backend that runs `op` on tensors like `tensor`.

    `backend`, else `use`, else the environment variable RECA_BACKEND forces a backend. Without one, or with "auto", the
    table decides. `dtype` and `numel` replace those of the tensor in that decision. On a machine with a GPU, `use` and
    RECA_BACKEND force nothing on the type of device that their backend is not for.

    Raises:
        ValueError: The name of the backend is unknown.
        RuntimeError: The forced backend cannot run.
    """
    device = torch.device("cuda") if _gpu_assumed else tensor.device
    forced = backend or _forced(device.type)
    # One compiled graph serves many sizes, so where sizes are symbolic the choice is that for a large tensor.
    numel = None if torch.compiler.is_compiling() else tensor.numel() if numel is None else numel
    if type(numel) is not int:
        numel = None
    if _gpu_assumed and not torch.cuda.is_available():
        return _choose_assumed(op, dtype or tensor.dtype, forced)
    return _choose(op, device, dtype or tensor.dtype, numel, forced)


def _forced(device: str) -> str:
    """Return the backend that `use` or RECA_BACKEND force on a type of device, or "auto".

    A backend of the other type of device forces nothing, if there is such a device: a run on a GPU draws masks on the
    CPU, too.
    """
    forced = _used or os.environ.get("RECA_BACKEND") or "auto"
    own = RUNS_ON.get(forced, device)
    if own == device or (forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return forced
    return "auto" if own == "cpu" or torch.cuda.is_available() else forced


def _choose_assumed(op: str, dtype: torch.dtype, forced: str) -> str:
    """Return the backend on a GPU that can run every one."""
    if forced != "auto":
        _check_known(op, forced)
        return forced
    return next((b for b in ORDER["cuda"] if dtype in FLOATS and has_backend(op, b)), "reference")


def _check_known(op: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")


@compiling.assume_constant_result  # a compiled graph keeps the choice made when it was traced
def _choose(op: str, device: torch.device, dtype: torch.dtype, numel: int | None, forced: str) -> str:
    return _decide(op, device, dtype, numel, forced)


@lru_cache(maxsize=4096)
def _decide(op: str, where: torch.device, dtype: torch.dtype, numel: int | None, forced: str) -> str:
    device, index = where.type, where.index
    if forced != "auto":
        _check_known(op, forced)
        if reason := unusable(op, forced, device, index):
            raise RuntimeError(
                f"{op}: backend '{forced}' was asked for, but {reason}. A forced backend never falls back; "
                "see reca_kernels.backend_report()"
            )
        if forced != "reference" and dtype not in FLOATS:
            raise RuntimeError(f"{op}: backend '{forced}' was asked for, but it takes fp32, bf16 or fp16, got {dtype}")
        return forced
    chosen = _by_table(op, device, index, dtype, numel)
    kernels = _kernels(op, device)
    if kernels and dtype in FLOATS and all(unusable(op, backend, device, index) for backend in kernels):
        _warn_slow(device, "; ".join(f"{backend}: {unusable(op, backend, device)}" for backend in kernels))
    return chosen


def _by_table(op: str, device: str, index: int | None, dtype: torch.dtype, numel: int | None) -> str:
    for rule in RULES.get((op, device), ()):
        below = rule.max_numel is None or (numel is not None and numel < rule.max_numel)
        above = numel is None or rule.min_numel <= numel
        if dtype in rule.dtypes and above and below and unusable(op, rule.backend, device, index) is None:
            return rule.backend
    return "reference"


def _kernels(op: str, device: str) -> list[str]:
    """Return the backends named by the rules, without the reference."""
    named = dict.fromkeys(rule.backend for rule in RULES.get((op, device), ()))
    return [backend for backend in named if backend != "reference"]


@cache
def _warn_slow(device: str, reasons: str) -> None:
    """Warn once for all ops that lack their kernels for the same reasons."""
    warnings.warn(f"ops run on their slow PyTorch reference on {device} ({reasons})", stacklevel=2)


def unusable(op: str, backend: str, device: str, index: int | None = None) -> str | None:
    """Return why `backend` cannot run `op` on that type of device; None if it can."""
    if backend == "reference":
        return None
    if not has_backend(op, backend):
        return f"it does not implement {op}"
    if backend in ("cpu", "cuda"):
        if native.module is None:
            return native.missing
        if device != backend:
            return f"the tensors are on {device}"
    if backend == "cuda" and not native.kernels().cuda_archs:
        return f"the native module was built without CUDA; put nvcc into PATH and {native.REINSTALL} RECA_CUDA=ON"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device == "cpu":
            return None if os.environ.get("TRITON_INTERPRET") == "1" else "the tensors are on cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        capability = torch.cuda.get_device_capability(index)
        if backend == "triton" and capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}"
        if backend == "cuda" and not native.cuda_runs_on(capability):
            return (
                f"the native module was built for {native.kernels().cuda_archs}, the device has "
                f"{capability[0]}.{capability[1]}; {native.REINSTALL} RECA_CUDA_ARCHS"
            )
    return None


@cache
def load(backend: str, op: str) -> Any:
    """Return the module that implements the op's `Kernels`. Callers annotate it with that protocol."""
    (module,) = _modules(op, backend)
    return importlib.import_module(f"reca_kernels.{op}.{module}")


def backend_report() -> str:
    """Return a report of versions, devices and, for every op, the backend that runs it and why others cannot.

    A backend forced by `use` or RECA_BACKEND is shown as such.
    """
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"]
    if native.module:
        lines.append(f"native module: {native.module.current_isa()} kernels, CUDA {native.module.cuda_archs or 'no'}")
    else:
        lines.append(f"NO NATIVE MODULE: {native.missing}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    found = {device: choices(device) for device in devices}
    lines += [f"{op} on {device}: {found[device][op]}" for op in found["cpu"] for device in devices]
    problems = importlib.import_module("reca_kernels.attention.flash_functions").problems()
    return "\n".join([*lines, *(f"attention: {problem}; reinstall or remove it" for problem in problems)])


class Choice(NamedTuple):
    """The backend that runs an op on large fp32 tensors, or attention's impl for bf16."""

    backend: str  # "none" if the forced one cannot run
    basis: str  # what the choice is based on
    others: list[str]  # why others cannot run

    def __str__(self) -> str:
        named = f"{self.backend}, {self.basis}" if self.basis else self.backend
        return f"{named}  (not {'; '.join(self.others)})" if self.others else named


def choices(device: str) -> dict[str, Choice]:
    """Return the choice on a type of device for every op and for attention."""
    attention = importlib.import_module("reca_kernels.attention.op")  # uses torch and flash-attn, not backends
    return {op: _default(op, device) for op in OPS} | {attention.OP: Choice(*attention.default(device))}


def _default(op: str, device: str) -> Choice:
    if (forced := _forced(device)) != "auto":
        by = f"forced by {'reca_kernels.dispatch.use' if _used else f'RECA_BACKEND={forced}'}"
        reason = unusable(op, forced, device) if forced in BACKENDS else "there is no such backend"
        return Choice("none", f"{by}, but {reason}", []) if reason else Choice(forced, by, [])
    chosen = _by_table(op, device, None, torch.float32, None)
    reasons = {backend: unusable(op, backend, device) for backend in _kernels(op, device)}
    others = [f"{b}: {'no native module' if r == native.missing else r}" for b, r in reasons.items() if r]
    # Where no kernel can run, the reference is not what was measured to be best.
    return Choice(chosen, "" if others and chosen == "reference" else _basis(op, device), others)


def _basis(op: str, device: str) -> str:
    """Return the measurements behind the choice."""
    entries = MEASURED.get((op, device))
    if not entries:
        return "not measured"
    return ", ".join(f"{e['dtype']} measured on {e['measured_on']} on {e['date']}" for e in entries)
