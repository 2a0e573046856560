"""A model on a GPU that is not there, and what would make the host wait for it.

The GPU is torch's device "meta": shapes without numbers. Tensors of the host are real, so what the host decides is
decided. `Waits` looks at every operator and refuses what waits for a GPU: numbers that the host is to see (item,
nonzero, a mask as an index, a copy to the host), and copies from the host that are not asked to be asynchronous.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from reca import rng
from reca_kernels.attention import plan as attention_plan
from reca_kernels.diffusion_loss import schedule

GPU = torch.device("meta")
COPY, INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
# What has as many results as the numbers say, or gives a number to the host.
OF_NUMBERS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "allclose",
}  # fmt: skip


class Waited(Exception):
    """The host would have waited for the GPU, or the operator could not have run there at all."""


class Calls(TorchFunctionMode):
    """Refuses tensors made of Python's numbers on the GPU: torch makes them on the host and copies them."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
    INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        there = isinstance(args[0], Tensor) and args[0].is_meta if args else False
        given = args[1] if func is torch.Tensor.new_tensor else args[0] if args else None
        nothing = isinstance(given, list) and not given  # is not copied
        numbers = not isinstance(given, Tensor) and not nothing
        if func in self.MAKERS and numbers and (_target(kwargs) or ("meta" if there else None)) == "meta":
            raise Waited(f"{func.__name__}: numbers of the host are copied to the GPU")
        if func in self.INDEXED and there and any(isinstance(x, list) for x in (args[1], *_parts(args[1]))):
            raise Waited(f"{func.__name__}: a list as an index is copied to the GPU")
        return func(*args, **kwargs)


class Waits(TorchDispatchMode):
    """Lets operators run, on host tensors as they are and on the GPU's as shapes, or raises Waited."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Calls()

    def __enter__(self) -> "Waits":
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.is_meta for x in tensors) or _target(kwargs) == "meta":
            self._check(func, tensors, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> None:
        name = func._schema.name.removeprefix("aten::")
        hosts = [x for x in tensors if not x.is_meta]
        if name in OF_NUMBERS:
            raise Waited(f"{func}: depends on numbers of the GPU")
        if func in (COPY, INTO):
            down = _target(kwargs) == "cpu" if func is COPY else not args[0].is_meta
            late = kwargs.get("non_blocking") or (func is INTO and len(args) > 2 and args[2])
            if down or (hosts and not late):
                raise Waited(f"{func}: a copy {'to' if down else 'from'} the host that is waited for")
        elif any(x.ndim for x in hosts):
            raise Waited(f"{func}: tensors of the host and of the GPU in one operator")
        elif name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise Waited(f"{func}: a mask as an index")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waited(f"{func}: without output_size")

    def put(self, value: Any) -> Any:
        """The same on the GPU, without its numbers. Modules are changed in place."""
        if isinstance(value, nn.Module):
            made: dict[int, Tensor] = {}
            for module in value.modules():
                for kept in (module._parameters, module._buffers):
                    for name, tensor in kept.items():
                        if tensor is not None:
                            kept[name] = made.setdefault(id(tensor), self._shape_of(tensor))
            return value
        return tree_map_only(Tensor, self._shape_of, value)

    def _shape_of(self, x: Tensor) -> Tensor:
        made = torch.empty_like(x, device=GPU)
        if isinstance(x, nn.Parameter):
            return nn.Parameter(made, requires_grad=x.requires_grad)
        return made


def modules_of(umm: str) -> list[ModuleType]:
    """The loaded modules of a model, and those whose losses it shares."""
    packages = {"janusflow": ("janus", "janusflow")}.get(umm, (umm,))
    packages = (*packages, "token_loss")
    return [m for name, m in sys.modules.items() if f"{name}.".startswith(tuple(f"reca.models.{p}." for p in packages))]


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """The mode, with random numbers that know such tensors, and nothing kept of it afterwards."""
    for name in ("philox_uniform", "philox_normal"):
        monkeypatch.setattr(rng, name, _drawn(getattr(rng, name)))
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **b: nullcontext() if kind == "meta" else autocast(kind, *a, **b)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))
    kept = (attention_plan._plan, schedule._schedule)
    try:
        for cached in kept:
            cached.cache_clear()
        yield Waits()
    finally:
        for cached in kept:
            cached.cache_clear()


def _drawn(real: Any) -> Any:
    def drawn(noise: Any, n: int, **options: Any) -> Tensor:
        if not noise.sample_ids.is_meta:
            return real(noise, n, **options)
        assert noise.seed.device == noise.sample_ids.device
        return torch.empty(len(noise.sample_ids), n, device=noise.sample_ids.device)

    return drawn


def _target(kwargs: dict) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def _parts(index: Any) -> tuple:
    return index if isinstance(index, tuple) else ()
