"""The variable-length attention functions of flash-attn and torch: which are available, and what each supports.

Three packages have a `flash_attn_varlen_func` with the same keywords. Only the presence of the function counts: if only
FlashAttention 4 is installed, `flash_attn` is an empty namespace package, and a package that was built for another
torch version fails at import.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from reca_kernels import compiling

NAME = "flash_attn_varlen_func"
KEYWORDS = frozenset("cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale causal deterministic".split())
MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}  # by impl
TITLES = {"fa4": "FlashAttention 4", "fa3": "FlashAttention 3", "fa2": "FlashAttention 2"}


class Found(NamedTuple):
    """The function of a module. None: the module is not installed, or `problem` says why it cannot be used."""

    function: Callable[..., Any] | None = None
    problem: str | None = None


@functools.cache
def found(module: str) -> Found:
    """Import a module and return its function or the problem. A failed import is not retried."""
    try:
        function = getattr(importlib.import_module(module), NAME, None)
    except ModuleNotFoundError as error:
        parents = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)}
        return Found() if error.name in parents else Found(problem=f"{module} needs {error.name}, which is missing")
    except Exception as error:  # whatever a broken extension raises: ImportError, OSError, AttributeError, ...
        said = str(error).strip().splitlines() or [""]
        return Found(problem=f"importing {module} fails with {type(error).__name__}: {said[0]}")
    if not callable(function):
        # A folder without __init__.py can be imported too: FlashAttention 4 installs one at FlashAttention 2's path.
        empty = getattr(importlib.import_module(module), "__file__", None) is None
        return Found() if empty else Found(problem=f"{module} has no {NAME}")
    if missing := KEYWORDS - _parameters(function):
        return Found(problem=f"{NAME} of {module} has no argument {', '.join(sorted(missing))}")
    return Found(function)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of its parameters; KEYWORDS if it takes **kwargs or has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return KEYWORDS
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return KEYWORDS
    return frozenset(p.name for p in parameters)


def problems() -> list[str]:
    """Return why packages that are installed cannot be used.

    FlashAttention 2 ships some files of 4, whose dependencies it does not need; this is not reported.
    """
    modules = [m for m in MODULES.values() if m != "flash_attn.cute" or found("flash_attn") == Found()]
    return [problem for module in modules if (problem := found(module).problem)]


def flash_problem(impl: str, capability: tuple[int, int], head_dim: int, deterministic: bool) -> str | None:
    """Return why a package cannot be used on a GPU of this compute capability; None if it can."""
    there = found(MODULES[impl])
    if there.function is None:
        return there.problem or f"{TITLES[impl]} ({MODULES[impl]}) is not installed"
    return _unfit(impl, capability, head_dim, deterministic)


def _unfit(impl: str, capability: tuple[int, int], head_dim: int, deterministic: bool) -> str | None:
    """Return why a package has no kernels for such tensors, as asserted in its interface.py and flash_api.cpp."""
    major = capability[0]
    if impl == "fa3" and major != 9:
        return f"runs on compute capability 9.x only, the device has {major}.{capability[1]}"
    if impl == "fa3" and deterministic and head_dim > 192:
        return f"has no deterministic gradient for head dimensions above 192, got {head_dim}"
    if impl == "fa4":
        if major not in (9, 10, 11, 12):
            return f"has a backward on compute capability 9.x to 12.x, the device has {major}.{capability[1]}"
        if major > 9 and head_dim > 128 and not (head_dim == 256 and major in (10, 11)):
            return f"supports head dimensions up to 128 on compute capability {major}.x, got {head_dim}"
        if deterministic and major == 12:
            return "has no deterministic gradient on compute capability 12.x"
    return None


def flash_function(impl: str) -> Callable[..., Any]:
    """Return the function of a package for which `flash_problem` is None."""
    return getattr(sys.modules[MODULES[impl]], NAME)


# ---- torch ----


@functools.cache
def varlen_parameters() -> frozenset[str]:
    """Return the parameter names of torch's varlen_attn; empty if torch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@compiling.assume_constant_result
def varlen_takes_enable_gqa() -> bool:
    """Return whether enable_gqa must be set when q has more heads; older versions always group heads."""
    return "enable_gqa" in varlen_parameters()
