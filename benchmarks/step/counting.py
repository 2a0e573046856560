"""What a step asks of the machine, counted from its operators: how many, FLOPs, bytes, and waits of the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from reca import check, objective

# Results of these have as many elements as numbers say, or a number goes to the host: on a GPU the host waits.
OF_NUMBERS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "allclose",
}  # fmt: skip
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "lift_fresh"}


class Counter(TorchDispatchMode):
    """Counts while operators run as they are.

    flops      of products, convolutions and attention; a multiply-add is two, a causal pair of tokens counts as any
    launches   operators that compute: on a GPU each is one kernel or more
    bytes      what all operators but products read and write
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.launches = self.bytes = 0
        self.found: list[str] | None = None

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """List operators of both passes that synchronise host and GPU: what they return depends on data."""
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
    """Count the FLOPs of a product, a convolution or attention; 0 for any other operator."""
    if name.startswith("_scaled_dot_product"):  # two products of scores or values, five in the backward pass
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        return (10 if backward else 4) * query.numel() * key.shape[-2]
    if packet in check.CONVOLUTIONS:
        shapes = [x.shape if isinstance(x, Tensor) else x for x in args]
        return check.CONVOLUTIONS[packet](*shapes, **kwargs)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


def _masked(args: tuple) -> bool:
    """Tell whether a mask is an index."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
