"""Template tokens, visual embeddings and additive rows, written once into a sequence of embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import has_values, plain
from reca_kernels.template_concat import reference
from reca_kernels.template_concat.kernels import Kernels

OP = "template_concat"


def template_concat(
    table: Tensor,  # [V, D]
    visual: Tensor,  # [Nv, D] or [B, n, D]
    src: Tensor,  # [..., L] int32 or int64
    *,
    adds: Sequence[tuple[Tensor, Tensor]] = (),  # rows [K, D], index [..., L]
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:  # [..., L, D]
    """Write a sequence of embeddings from an embedding table, visual embeddings and additive rows.

        x[t] = (table[src[t]] if src[t] >= 0 else visual[-1 - src[t]]) + sum over adds of rows[index[t]]

    A negative index in `adds` adds nothing. `concat_plan` computes src. Rows may be used any number of times. Sums are
    accumulated in fp32, left to right, and rounded once; without additions rows are copied.

    Shapes       src [..., L] gives [..., L, D]. Sources may differ in dtype: fp32, bf16, fp16.
    Returns      out_dtype, default: the dtype of the table. Autocast has no effect, as for an embedding.
    Bad index    Row indices are checked on CPUs, and on GPUs with RECA_CHECK=1. Without the check the kernels make a
                 position with an index out of range NaN and drop its gradient.
    Derivatives  First derivatives with respect to table, visual and rows; backend="reference" has all.

    Raises:
        ValueError: Shapes do not match, an index is out of range, tensors are on several devices, or the backend is
            unknown.
        TypeError: table, visual, rows or out_dtype are not of a float dtype, `adds` is not a list of pairs, an index is
            not int32 or int64, or a tensor is sparse, nested, quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, torch.jit.trace is active, or a
            kernel's gradient is differentiated again.
    """
    checks.result_dtype(OP, out_dtype)
    if any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in adds):
        raise TypeError(f"{OP}: adds must be a list of pairs (rows, index)")
    rows = (table, visual, *(r for r, _ in adds))
    indices = (src, *(i for _, i in adds))
    if not (raw := plain(*rows, *indices)):
        others = {f"the index of adds[{i}]": index for i, index in enumerate(indices[1:])}
        checks.dispatchable(OP, src=src, **_named(rows), **others)
    width = table.shape[-1]
    for name, tensor in _named(rows).items():
        checks.floating(OP, **{name: tensor})
        if tensor.ndim not in ((2, 3) if name == "visual" else (2,)) or tensor.shape[-1] != width:
            shape = "[Nv, D] or [B, n, D]" if name == "visual" else "[rows, D]"
            raise ValueError(f"{OP}: {name} must be {shape} with the table's D = {width}, got {list(tensor.shape)}")
    for index in indices:
        checks.integer(OP, **{"src" if index is src else "the index in adds": index})
        if index.shape != src.shape:
            raise ValueError(
                f"{OP}: an index in adds must be shaped like src, {list(src.shape)}, got {list(index.shape)}"
            )
    out_dtype = out_dtype or table.dtype
    # A dtype that only the reference supports, if there is one, decides the backend.
    dtype = next((d for d in (out_dtype, *(r.dtype for r in rows)) if d not in dispatch.FLOATS), table.dtype)
    backend = dispatch.choose(OP, table, backend, dtype=dtype)
    rows = tuple(r.flatten(0, 1) if r.ndim == 3 else r for r in rows)
    if backend == "reference":
        if has_values(*indices):
            _check_indices(rows, indices)
        return reference.template_concat(table, visual, src, adds=adds, out_dtype=out_dtype)
    flat = tuple(index.reshape(-1).contiguous() for index in indices)
    return _forward(raw, rows, flat, out_dtype, backend).view(*src.shape, width)


def _named(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    table, visual, *added = rows
    return {"table": table, "visual": visual, **{f"adds[{i}]": r for i, r in enumerate(added)}}


def _check_indices(rows: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    src, *others = indices
    checks.index_inside(OP, "src", src, -rows[1].shape[0], rows[0].shape[0])
    for number, (source, index) in enumerate(zip(rows[2:], others, strict=True)):
        checks.index_inside(OP, f"the index of adds[{number}]", index, None, source.shape[0])


def _sources(indices: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
    """Return the index of each source and whether it is negated. The table and the visual rows share src."""
    src, *others = indices
    return [(src, False), (src, True), *((index, False) for index in others)]


def _dense(x: Tensor) -> Tensor:
    """Return x with contiguous rows and any stride between them."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- kernel ops ----


@kernel_op(
    f"{OP}(Tensor[] rows, Tensor[] indices, ScalarType out_dtype, str backend) -> Tensor",
    lambda rows, indices, out_dtype, backend: rows[0].new_empty(
        (indices[0].shape[0], rows[0].shape[1]), dtype=out_dtype
    ),
)
def _forward(rows: Sequence[Tensor], indices: Sequence[Tensor], out_dtype: torch.dtype, backend: str) -> Tensor:
    _check_indices(rows, indices)
    sources = [(_dense(r), *index) for r, index in zip(rows, _sources(indices), strict=True)]
    kernels: Kernels = dispatch.load(backend, OP)
    return kernels.forward(sources, out_dtype)


@kernel_op(
    f"{OP}_backward(Tensor grad, Tensor index, bool negated, SymInt count, ScalarType dtype, str backend) -> Tensor",
    lambda grad, index, negated, count, dtype, backend: grad.new_empty((count, grad.shape[1]), dtype=dtype),
)
def _gradient(grad: Tensor, index: Tensor, negated: bool, count: int, dtype: torch.dtype, backend: str) -> Tensor:
    kernels: Kernels = dispatch.load(backend, OP)
    return kernels.backward(_dense(grad), index, negated, count, dtype)


# ---- gradient ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, indices, _, ctx.backend = inputs
    ctx.sources = [(r.shape[0], r.dtype, r.requires_grad) for r in rows]
    ctx.save_for_backward(*indices)  # the gradient does not depend on the rows


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None]]:
    indices = ctx.saved_tensors  # unpacked once: activation checkpointing recomputes at every access
    raw = plain(grad, *indices)
    gradients = [
        _gradient(raw, grad, *index, count, dtype, ctx.backend) if need else None
        for (count, dtype, need), index in zip(ctx.sources, _sources(indices), strict=True)
    ]
    return (gradients,)


_forward.register_autograd(_backward, setup_context=_setup_context, of=["rows"])
