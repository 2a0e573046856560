"""Attention by torch's CPU kernel, group by group, with one buffer for the output and one for each gradient.

The kernel is that of scaled_dot_product_attention. Called by the latter, the output of every group is kept for the
backward pass besides the output of all rows, and every group's gradient is padded to all rows before it is added.
"""

from typing import Any

import torch
from torch import Tensor

from reca_kernels.attention.plan import AttentionPlan, Interval, QueryGroup, total
from reca_kernels.memory import plain

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def usable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernel can be called directly. scaled_dot_product_attention may take another one."""
    return plain(q, k, v) and q.is_cpu and q.numel() > 0 and torch.backends.cuda.flash_sdp_enabled()


def on_cpu(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Compute attention over a plan in which at least one row attends to a key."""
    # The kernel needs unit stride along the channels of a head.
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    if plan.uniform:
        rows = [x.reshape(len(plan.samples), -1, *x.shape[-2:]) for x in rows]
        groups = plan.groups[0]
    else:
        rows = [x.reshape(1, -1, *x.shape[-2:]) for x in rows]
        groups = _of_batch(plan)
    out: Tensor = _Groups.apply(*rows, groups, scale)
    return out.view(q.shape)


def _of_batch(plan: AttentionPlan) -> tuple[QueryGroup, ...]:
    """Return the groups of all samples, with rows and keys numbered within the batch."""
    found, query, key = [], 0, 0
    for groups, queries, keys in zip(plan.groups, plan.query_sizes, plan.key_sizes, strict=True):
        found += [QueryGroup(_moved(one.rows, query), _moved(one.keys, key), one.causal) for one in groups]
        query, key = query + queries, key + keys
    return tuple(found)


def _moved(intervals: tuple[Interval, ...], by: int) -> tuple[Interval, ...]:
    return tuple((start + by, stop + by) for start, stop in intervals)


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: tuple[QueryGroup, ...], scale: float) -> Tensor:
        out = _memory(q, q.shape, sum(total(group.rows) for group in groups))
        logs = []
        for group in groups:
            part, log_sum_exp = _forward(*_inputs(group, q, k, v), **_options(group, q.dtype, scale))
            _write(out, part.transpose(1, 2), group.rows)
            logs.append(log_sum_exp)
        ctx.save_for_backward(q, k, v, out, *logs)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *logs = ctx.saved_tensors
        by_query, by_key, by_value = [], None, None
        # In autograd's order. The last group tends to read all keys, and others are then added to its gradient.
        for group, log_sum_exp in zip(reversed(ctx.groups), reversed(logs), strict=True):
            upstream, result = (_taken(x, group.rows) for x in (grad, out))
            options = _options(group, q.dtype, ctx.scale)
            of_q, of_k, of_v = _backward(upstream, *_inputs(group, q, k, v), result, log_sum_exp, **options)
            by_query.append((group.rows, of_q.transpose(1, 2)))
            by_key = _sum(by_key, of_k.transpose(1, 2), group.keys, k.shape)
            by_value = _sum(by_value, of_v.transpose(1, 2), group.keys, v.shape)
            del of_k, of_v
        gradient = _memory(by_query[0][1], q.shape, sum(total(rows) for rows, _ in by_query))
        for rows, part in by_query:
            _write(gradient, part, rows)
        return gradient, by_key, by_value, None, None


def _memory(like: Tensor, shape: torch.Size, rows: int) -> Tensor:
    """Return memory for all rows, of which `rows` will be written; the others are 0. vmap batches it as `like`."""
    return (like.new_empty if rows == shape[1] else like.new_zeros)(shape)


def _options(group: QueryGroup, dtype: torch.dtype, scale: float) -> dict[str, Any]:
    rows, keys = total(group.rows), total(group.keys)
    mask = None
    if group.causal and keys > rows:  # is_causal would align the first row with the first key
        mask = torch.full((rows, keys), -torch.inf, dtype=dtype).triu_(keys - rows + 1)
    return {"dropout_p": 0.0, "is_causal": group.causal and mask is None, "attn_mask": mask, "scale": scale}


def _inputs(group: QueryGroup, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return _taken(q, group.rows), _taken(k, group.keys), _taken(v, group.keys)


def _taken(x: Tensor, intervals: tuple[Interval, ...]) -> Tensor:
    """Return rows of [B, L, H, d] as [B, H, rows, d]."""
    parts = [x.narrow(1, start, stop - start) for start, stop in intervals]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)


def _parts(x: Tensor, intervals: tuple[Interval, ...]) -> tuple[Tensor, ...]:
    return x.split([stop - start for start, stop in intervals], dim=1)


def _write(to: Tensor, x: Tensor, intervals: tuple[Interval, ...]) -> None:
    for (start, stop), part in zip(intervals, _parts(x, intervals), strict=True):
        to[:, start:stop] = part


def _sum(so_far: Tensor | None, x: Tensor, intervals: tuple[Interval, ...], shape: torch.Size) -> Tensor:
    """Return the gradient of all rows after that of some rows is added. The first one is taken over if it has all."""
    if so_far is None:
        if intervals == ((0, shape[1]),):
            return x
        so_far = x.new_zeros(shape)
    for (start, stop), part in zip(intervals, _parts(x, intervals), strict=True):
        so_far[:, start:stop] += part
    return so_far
