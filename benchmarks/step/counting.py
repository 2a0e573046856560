"""The operators of a step, with their FLOPs, bytes and host synchronisations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from reca import objective
from reca.estimate import counts

# Operators whose output shape depends on data, or that return a number to the host: on a GPU they synchronise.
OF_NUMBERS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "allclose",
}  # fmt: skip
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh"}


class Counter(TorchDispatchMode):
    """Counts operators while they run unchanged.

    flops      of matmuls, convolutions and attention; a multiply-add is two, and masked pairs of tokens count in full
    launches   operators that compute; on a GPU each launches at least one kernel
    bytes      read and written by all operators without FLOPs
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.launches = self.bytes = 0
        self.found: list[str] | None = None

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """Collect the operators of both passes that synchronise with a GPU because their results depend on data."""
        inner, found = objective.backward, []

        def backward(*args: Any, **kwargs: Any) -> Any:
            self.found = found
            try:
                return inner(*args, **kwargs)
            finally:
                self.found = None

        with mock.patch.object(objective, "backward", backward):
            yield found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if self.found is not None and (name in OF_NUMBERS or (name.startswith("index") and _masked(args))):
            self.found.append(name)
        if func.is_view or name in FREE:
            return out
        self.launches += 1
        if flops := _flops(func.overloadpacket, name, args, kwargs, out):
            self.flops += flops
        else:
            self.bytes += sum(x.numel() * x.itemsize for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


def _flops(packet: Any, name: str, args: tuple, kwargs: dict, out: Any) -> int:
    """Return the FLOPs of a matmul, a convolution or attention; 0 for any other operator."""
    if name.startswith("_scaled_dot_product"):  # two matmuls forward, five backward
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        return (10 if backward else 4) * query.numel() * key.shape[-2]
    if packet in counts.CONVOLUTIONS:
        shapes = [x.shape if isinstance(x, Tensor) else x for x in args]
        return counts.CONVOLUTIONS[packet](*shapes, **kwargs)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _masked(args: tuple) -> bool:
    """Return whether an index is a boolean mask."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
