"""Which backend runs an op, and why.

A backend is a folder of this package, and an op is one file in it: reca_kernels.<backend>.<op>. What a backend's file
must hold is stated in reca_kernels/ops/<op>.py. `reference` is plain PyTorch and always there.
"""

import importlib
import importlib.util
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels import native

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPS = (
    "philox",
    "template_concat",
    "masked_cross_entropy",
    "masked_linear_cross_entropy",
    "flow_matching",
    "diffusion_loss",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Rule(NamedTuple):
    """Use `backend` for these dtypes when the op's main tensor has min_numel <= elements < max_numel."""

    backend: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    min_numel: int = 0
    max_numel: int | None = None


# (op, device type) -> rules, the first that fits and can run here wins; none: reference.
# Order and limits come from benchmarks/results, where every backend is timed at the shapes of the four models.
RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    **{(op, "cpu"): (Rule("cpu"),) for op in OPS},
    **{(op, "cuda"): (Rule("cuda"), Rule("triton")) for op in OPS},
}


def choose(op: str, tensor: Tensor, backend: str | None = None, *, dtype: torch.dtype | None = None) -> str:
    """The backend that runs `op` on tensors like `tensor`; `dtype` where another one than the tensor's decides.

    `backend`, else the environment variable RECA_BACKEND, forces one, and raises where that one cannot run: ValueError
    for an unknown name, RuntimeError otherwise. With neither, or "auto", the table decides.
    """
    forced = backend or os.environ.get("RECA_BACKEND") or "auto"
    # A compiled graph is made once for many sizes, so there the table is read as for a large tensor.
    numel = None if torch.compiler.is_compiling() else tensor.numel()
    return _choose(op, tensor.device.type, tensor.device.index, dtype or tensor.dtype, numel, forced)


@torch.compiler.assume_constant_result  # a compiled graph keeps the choice that was made when it was traced
def _choose(op: str, device: str, index: int | None, dtype: torch.dtype, numel: int | None, forced: str) -> str:
    return _decide(op, device, index, dtype, numel, forced)


@lru_cache(maxsize=4096)
def _decide(op: str, device: str, index: int | None, dtype: torch.dtype, numel: int | None, forced: str) -> str:
    if forced != "auto":
        if forced not in BACKENDS:
            raise ValueError(f"{op}: unknown backend {forced!r}; expected auto, {', '.join(BACKENDS)}")
        if reason := unusable(op, forced, device, index):
            raise RuntimeError(
                f"{op}: backend '{forced}' was asked for, but {reason}. A forced backend never falls back; "
                "see reca_kernels.backend_report()"
            )
        if forced != "reference" and dtype not in FLOATS:
            raise RuntimeError(f"{op}: backend '{forced}' was asked for, but it takes fp32, bf16 or fp16, got {dtype}")
        return forced
    rules = RULES.get((op, device), ())
    for rule in rules:
        fits = numel is None or (rule.min_numel <= numel and (rule.max_numel is None or numel < rule.max_numel))
        if dtype in rule.dtypes and fits and unusable(op, rule.backend, device, index) is None:
            return rule.backend
    if rules and dtype in FLOATS and not any(unusable(op, rule.backend, device, index) is None for rule in rules):
        _warn_slow(op, device)
    return "reference"


@cache
def _warn_slow(op: str, device: str) -> None:
    reasons = "; ".join(f"{rule.backend}: {unusable(op, rule.backend, device, None)}" for rule in RULES[op, device])
    warnings.warn(f"{op} runs on its PyTorch reference on {device} ({reasons})", stacklevel=2)


def unusable(op: str, backend: str, device: str, index: int | None = None) -> str | None:
    """Why `backend` cannot run `op` on that kind of device; None when it can."""
    if backend == "reference":
        return None
    if not (Path(__file__).parent / backend / f"{op}.py").exists():
        return f"it has no {op}"
    if backend in ("cpu", "cuda"):
        if native.module is None:
            return native.missing
        if device != backend:
            return f"the tensors are on {device}"
    if backend == "cuda" and not native.module.cuda_archs:
        return "the native module was built without CUDA; reinstall with nvcc in PATH and RECA_CUDA=ON"
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
                f"the native module was built for {native.module.cuda_archs}, the device has "
                f"{capability[0]}.{capability[1]}; reinstall with RECA_CUDA_ARCHS"
            )
    return None


@cache
def load(backend: str, op: str) -> ModuleType:
    return importlib.import_module(f"reca_kernels.{backend}.{op}")


def backend_report() -> str:
    """Versions, devices, and per op the backends that can run it, or why they cannot."""
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
    if forced := os.environ.get("RECA_BACKEND"):
        lines.append(f"RECA_BACKEND={forced} forces that backend")
    for op in OPS:
        for device in devices:
            able = [b for b in BACKENDS if unusable(op, b, device) is None]
            chosen = next((r.backend for r in RULES.get((op, device), ()) if r.backend in able), "reference")
            why = [
                f"{r.backend}: {unusable(op, r.backend, device)}" for r in RULES[op, device] if r.backend not in able
            ]
            lines.append(f"{op} on {device}: {chosen}" + (f"  (not {'; '.join(why)})" if why else ""))
    attention = importlib.import_module("reca_kernels.ops.attention")  # runs on torch and flash-attn, not on backends
    lines += map(attention.report, devices)
    return "\n".join(lines)
