"""Attention by torch's scaled_dot_product_attention, group by group."""

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reca_kernels.attention.plan import AttentionPlan, QueryGroup, QueryPiece
from reca_kernels.attention.sdpa_on_cpu import on_cpu, usable

HALVES = (torch.bfloat16, torch.float16)
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    if not q.is_cuda:
        return on_cpu(q, k, v, plan, scale) if usable(q, k, v) else _by_groups(q, k, v, plan, scale)
    with sdpa_kernel(WITHOUT_PLANS):
        return _by_groups(q, k, v, plan, scale)


def cudnn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return _by_groups(q, k, v, plan, scale)


def _by_groups(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    if plan.uniform and q.ndim == 4:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _sample(q, k, v, plan.groups[0], plan.pieces[0], scale).transpose(1, 2)
    sizes = (plan.query_sizes, plan.key_sizes, plan.key_sizes)
    lines = (_lines(x, size) for x, size in zip((q, k, v), sizes, strict=True))
    outs = [
        _sample(queries, keys, values, groups, pieces, scale)
        for queries, keys, values, groups, pieces in zip(*lines, plan.groups, plan.pieces, strict=True)
    ]
    if q.ndim == 4:
        return torch.cat(outs).transpose(1, 2)
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _lines(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split x into [1, H, L, d] per sample, in one operation, so that the gradient is assembled once."""
    parts = x.unbind(0) if x.ndim == 4 else x.split(list(sizes))
    return [part.transpose(0, 1)[None] for part in parts]


def _sample(
    q: Tensor, k: Tensor, v: Tensor, groups: tuple[QueryGroup, ...], pieces: tuple[QueryPiece, ...], scale: float
) -> Tensor:
    """Compute attention within one sample, or within a batch of uniform samples, [B, H, L, d]."""
    parts = q.split([piece.length for piece in pieces], dim=2)
    outs = [torch.zeros_like(part) if piece.group < 0 else part for part, piece in zip(parts, pieces, strict=True)]
    for number, group in enumerate(groups):
        own = [i for i, piece in enumerate(pieces) if piece.group == number]
        queries = _gathered([parts[i] for i in own])
        keys = _gathered([k.narrow(2, start, stop - start) for start, stop in group.keys])
        values = _gathered([v.narrow(2, start, stop - start) for start, stop in group.keys])
        before = keys.shape[2] - queries.shape[2]  # keys that all rows of a causal group attend to
        sees = None
        if group.causal and before:
            sees = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(before)
        # cuDNN refuses a single key.
        with sdpa_kernel(WITHOUT_PLANS) if keys.shape[2] == 1 else contextlib.nullcontext():
            out = fused(queries, keys, values, sees, scale, is_causal=group.causal and not before)
        for i, part in zip(own, out.split([pieces[i].length for i in own], dim=2), strict=True):
            outs[i] = part
    return _gathered(outs)


def fused(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None, scale: float, *, is_causal: bool = False) -> Tensor:
    """Return the attention of [B, H, L, d], by a kernel that does not materialise the scores if torch has one."""
    grouped = bool(q.shape[1] != k.shape[1])
    if grouped and q.is_cuda and (sees is not None or q.dtype not in HALVES):
        # Flash supports neither masks nor fp32, the efficient kernel no grouped heads, and `math` materialises all
        # scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def _gathered(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
