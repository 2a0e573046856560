"""Attention by a few calls of a variable-length function: flash-attn's or torch's."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reca_kernels.attention.flash_functions import flash_function, varlen_takes_enable_gqa
from reca_kernels.attention.gather import flat, put, take
from reca_kernels.attention.plan import AttentionPlan, Call

Varlen = Callable[[Tensor, Tensor, Tensor, Call, float, bool], Tensor]


def _by_calls(
    call_one: Varlen, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool
) -> Tensor:
    # The kernels need unit stride along the channels of a head, and support any stride of heads and rows.
    rows, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in map(flat, (q, k, v)))
    order, unpadded, calls = plan.calls
    queries = take(rows, order).split([call.rows for call in calls])
    k, v = take(k, unpadded), take(v, unpadded)
    outs = [
        call_one(one, take(k, call.keys), take(v, call.keys), call, scale, deterministic)
        for one, call in zip(queries, calls, strict=True)
    ]
    return put(outs[0] if len(outs) == 1 else torch.cat(outs), order, rows.shape[0]).view(q.shape)


def flash(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, same: bool) -> Tensor:
    return _by_calls(functools.partial(_flash_call, impl), q, k, v, plan, scale, same)


def _flash_call(impl: str, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, deterministic: bool) -> Tensor:
    out = flash_function(impl)(
        q,
        k,
        v,
        cu_seqlens_q=call.cu_q,
        cu_seqlens_k=call.cu_k,
        max_seqlen_q=call.max_q,
        max_seqlen_k=call.max_k,
        softmax_scale=scale,
        causal=call.causal,
        deterministic=deterministic,
    )
    return out[0] if isinstance(out, tuple) else out  # some versions of FlashAttention 3 return (out, lse)


def varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    return _by_calls(_varlen_call, q, k, v, plan, scale, deterministic)


def _varlen_call(q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, deterministic: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if varlen_takes_enable_gqa() else {}
    out: Any = varlen_attn(
        q,
        k,
        v,
        call.cu_q,
        call.cu_k,
        call.max_q,
        call.max_k,
        scale=scale,
        window_size=(-1, 0) if call.causal else (-1, -1),
        **grouped,
    )
    return out
