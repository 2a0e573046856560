"""Gather and scatter rows by unique indices, with gradients that are copies."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels.memory import transformed


class _Take(torch.autograd.Function):
    """x[index] for unique indices: the gradient is a copy, where that of indexing is a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return put(grad, index, ctx.rows), None


def take(x: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x
    return x.index_select(0, index) if transformed() else _Take.apply(x, index)


class Spread(torch.autograd.Function):
    """`put` for unique indices: the gradient gathers the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return put(x, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def put(x: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Return [rows, ...] with x at index and 0 elsewhere."""
    if index is None:
        return x
    make = x.new_empty if x.shape[0] == rows else x.new_zeros
    return make(rows, *x.shape[1:]).index_copy_(0, index, x)


def flat(x: Tensor) -> Tensor:
    """[rows, H, d]"""
    return x.reshape(-1, *x.shape[-2:])
