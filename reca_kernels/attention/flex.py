"""Attention by FlexAttention: one compiled kernel that skips fully masked blocks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reca_kernels import compiling
from reca_kernels.attention.gather import flat, put, take
from reca_kernels.attention.plan import AttentionPlan
from reca_kernels.host import no_modes, on_device, outside_of_modes


def flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    rows = flat(q)
    queries, unpadded, blocks = _blocks(plan)
    packed = [take(rows, queries), take(flat(k), unpadded), take(flat(v), unpadded)]
    packed = [x.transpose(0, 1)[None] for x in packed]
    on_gpu = q.device.type == "cuda" and not torch.compiler.is_compiling()
    run: Any = _compiled(flex_attention) if on_gpu else flex_attention
    out = run(*packed, block_mask=blocks, scale=scale, enable_gqa=bool(q.shape[-2] != k.shape[-2]))
    return put(out[0].transpose(0, 1), queries, rows.shape[0]).view(q.shape)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@compiling.disable
def _blocks(plan: AttentionPlan) -> tuple[Tensor | None, Tensor | None, Any]:
    # Not cached under a dispatch mode: the block mask reads tensors by closure, which in_mode cannot convert.
    return _make_blocks(plan) if torch._C._len_torch_dispatch_stack() else _blocks_of(plan)


@outside_of_modes
def _flex_rows(plan: AttentionPlan) -> tuple[Any, ...]:
    """Return the query rows without padding, likewise the key rows (None: all), and the columns of both."""
    spans = [(number, span) for number, sample in enumerate(plan.samples) for span in sample]
    table = torch.tensor(
        [
            (
                i,
                number,
                span.mode != "causal",
                span.mode == "noise",
                span.visible_to_earlier,
                span.mode == "pad",
                span.cached,
            )
            for i, (number, span) in enumerate(spans)
        ],
        dtype=torch.int32,
    )
    table = table.view(-1, 7).repeat_interleave(torch.tensor([span.length for _, span in spans], dtype=torch.int64), 0)
    solid, asked = table[:, 5] == 0, table[:, 6] == 0
    queries, keys = (
        None if bool(chosen.all()) else on_device(chosen.nonzero()[:, 0], plan.device)
        for chosen in (solid[asked], solid)
    )
    return queries, keys, _columns(table, solid & asked, plan.device), _columns(table, solid, plan.device)


def _make_blocks(plan: AttentionPlan) -> tuple[Tensor | None, Tensor | None, Any]:
    """Return the query rows without padding, likewise the key rows (None: all), and the block mask between them."""
    from torch.nn.attention.flex_attention import create_block_mask

    queries, keys, (rows_q, place_q), (rows_k, place_k) = _flex_rows(plan)
    span_q, sample_q, whole_q, _, _ = rows_q
    span_k, sample_k, _, noise_k, early_k = rows_k

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = (whole_q[i] > 0) | (place_k[j] <= place_q[i])
        other = torch.where(span_k[j] < span_q[i], noise_k[j] == 0, early_k[j] > 0)
        return (sample_k[j] == sample_q[i]) & torch.where(span_k[j] == span_q[i], own, other)

    blocks = create_block_mask(sees, None, None, len(place_q), len(place_k), device=plan.device)
    return queries, keys, blocks


_blocks_of = functools.lru_cache(maxsize=8)(no_modes()(_make_blocks))


def _columns(table: Tensor, chosen: Tensor, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return span, sample and rules of the chosen rows, int32 each, and the indices of these rows."""
    return on_device(table[chosen][:, :5].T.contiguous(), device).unbind(0), on_device(chosen.nonzero()[:, 0], device)
