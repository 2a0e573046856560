"""Attention over spans with a dense mask per sample, in plain PyTorch: the reference implementation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca_kernels.attention.plan import AttentionPlan, AttentionSpan


def allowed(sample: Sequence[AttentionSpan]) -> Tensor:  # bool [query rows, key rows]
    """Return the mask of one sample, directly from the rules of `AttentionSpan`."""
    lengths = torch.tensor([span.length for span in sample], dtype=torch.int64)

    def of_row(values: list[Any], dtype: torch.dtype = torch.bool) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)

    place, number = torch.arange(int(lengths.sum())), of_row(list(range(len(sample))), torch.int64)
    whole, hidden = (
        of_row([span.mode != "causal" for span in sample]),
        of_row([span.mode == "noise" for span in sample]),
    )
    early, pad = of_row([span.visible_to_earlier for span in sample]), of_row([span.mode == "pad" for span in sample])
    own = whole[:, None] | (place <= place[:, None])
    other = torch.where(number < number[:, None], ~hidden, early)
    sees = torch.where(number == number[:, None], own, other) & ~pad & ~pad[:, None]
    return sees[sum(span.length for span in sample if span.cached) :]


def attention(
    q: Tensor,  # [Tq, Hq, d] or [B, Lq, Hq, d]
    k: Tensor,  # [Tk, Hk, d] or [B, Lk, Hk, d]
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
) -> Tensor:  # as q
    """Compute `reca_kernels.attention`. Scores and sums are fp32 (fp64 when q is fp64) and rounded once."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[-2] // k.shape[-2]  # query heads that share a key head
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = [x.reshape(-1, *x.shape[-2:]).to(wide) for x in (q, k, v)]
    sizes = (plan.query_sizes, plan.key_sizes, plan.key_sizes)
    parts = (x.split(size) for x, size in zip(heads, sizes, strict=True))
    out = []
    for sample, queries, keys, values in zip(plan.samples, *parts, strict=True):
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        sees = allowed(sample).to(q.device)
        # Rows that are not finite are replaced by 0, and rows that attend to them become NaN: 0 * NaN must not reach
        # other rows.
        lost = ~(keys.isfinite() & values.isfinite()).all(-1)  # [key rows, Hq]
        keys, values = (torch.where(lost[..., None], 0, x) for x in (keys, values))
        poisoned = (sees[:, :, None] & lost).any(1) | (~queries.isfinite().all(-1) & sees.any(1, keepdim=True))
        queries = torch.where(queries.isfinite().all(-1, keepdim=True) & ~poisoned[..., None], queries, 0)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~sees.any(1, keepdim=True), 0)  # fully masked rows
        seen = torch.einsum("hqk,khd->qhd", weights, values)
        out.append(seen.masked_fill(~sees.any(1)[:, None, None], 0).masked_fill(poisoned[..., None], torch.nan))
    return torch.cat(out).to(q.dtype).view(q.shape) if out else torch.zeros_like(q)
