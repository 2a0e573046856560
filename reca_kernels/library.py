"""Registration of ops with torch, and what every op's autograd shares.

In eager mode an op runs through its autograd.Function, which costs half of what a registered op costs. Under
torch.compile it is a registered op, so that it is one node of the graph. Both call the same kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("reca", "DEF")


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> Any:
    """Register `name(arguments) -> results` and return torch.ops.reca.name.

    kernel         runs it on real tensors
    fake           allocates results of the same shape, dtype, stride
    backward       (ctx, *grads) -> a gradient or None per argument; without it, to differentiate the op is an error
    setup_context  (ctx, inputs, output), saves what backward needs
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"reca::{name}", fake, lib=_library)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_twice(name.removesuffix("_backward")))

    torch.library.register_autograd(
        f"reca::{name}", backward or refuse, setup_context=setup_context if backward else None, lib=_library
    )
    return getattr(torch.ops.reca, name)


def _twice(op: str) -> str:
    return (
        f"{op} has no second derivative: its gradient comes from a kernel. "
        f"Use backend='reference' where a gradient is differentiated again"
    )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_twice(ctx.op))


def once(op: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients made by a kernel, such that differentiating them raises our own sentence.

    `sources` are the tensors that the gradients depend on. Costs nothing unless create_graph is on.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    present = [g for g in grads if g is not None]
    marked = iter(_Once.apply(op, len(present), *present, *sources))
    return tuple(None if g is None else next(marked) for g in grads)
