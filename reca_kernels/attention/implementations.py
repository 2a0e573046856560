"""Implementations of an attention plan, and the conditions under which each can run.

Each takes q, k, v (rows in the leading dimensions, then heads and channels), the plan, the scale, and whether the
gradient must be deterministic; it returns the attention output of q's rows. All are exact and differ in rounding only.

    fa4      FlashAttention 4's variable-length function (flash_attn.cute; Hopper and Blackwell)
    fa3      FlashAttention 3's (flash_attn_interface; Hopper)
    fa2      FlashAttention 2's (flash_attn)
    varlen   the one inside torch (torch.nn.attention.varlen)
    sdpa     torch's scaled_dot_product_attention, group by group; any device and dtype. On GPUs cuDNN is excluded: it
             makes a plan for every new shape, in 0.4 to 1 s (modelscope/FunASR#3704)
    cudnn    the same with cuDNN only
    flex     FlexAttention: one compiled kernel that skips fully masked blocks
    dense    scaled_dot_product_attention with one mask over the padded batch
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reca_kernels.attention.flash_functions import (
    MODULES,
    flash_function,
    flash_problem,
    varlen_is_told_of_groups,
    varlen_parameters,
)
from reca_kernels.attention.plan import AttentionPlan, AttentionSpan, Call, QueryGroup, QueryPiece
from reca_kernels.attention.reference import allowed
from reca_kernels.host import no_modes, on_device, outside_of_modes
from reca_kernels.memory import transformed

HALVES = (torch.bfloat16, torch.float16)
SHORT = 256  # dense masks of samples with at most this many rows are cached

# ---- variable-length calls ----


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
        return _put(grad, index, ctx.rows), None


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return x
    return x.index_select(0, index) if transformed() else _Take.apply(x, index)


class _Spread(torch.autograd.Function):
    """`_put` for unique indices: the gradient gathers the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return _put(x, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


def _put(x: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Return [rows, ...] with x at index and 0 elsewhere."""
    if index is None:
        return x
    make = x.new_empty if x.shape[0] == rows else x.new_zeros
    return make(rows, *x.shape[1:]).index_copy_(0, index, x)


def _flat(x: Tensor) -> Tensor:
    """[rows, H, d]"""
    return x.reshape(-1, *x.shape[-2:])


Varlen = Callable[[Tensor, Tensor, Tensor, Call, float, bool], Tensor]


def _by_calls(
    call_one: Varlen, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool
) -> Tensor:
    # The kernels need unit stride along the channels of a head, and support any stride of heads and rows.
    rows, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in map(_flat, (q, k, v)))
    order, unpadded, calls = plan.calls
    queries = _take(rows, order).split([call.rows for call in calls])
    k, v = _take(k, unpadded), _take(v, unpadded)
    outs = [
        call_one(one, _take(k, call.keys), _take(v, call.keys), call, scale, deterministic)
        for one, call in zip(queries, calls, strict=True)
    ]
    return _put(outs[0] if len(outs) == 1 else torch.cat(outs), order, rows.shape[0]).view(q.shape)


def _flash(impl: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, same: bool) -> Tensor:
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

    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if varlen_is_told_of_groups() else {}
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


# ---- torch's scaled_dot_product_attention ----


WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    if not q.is_cuda:
        return _by_groups(q, k, v, plan, scale)
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
        grouped = bool(q.shape[1] != k.shape[1])
        if grouped and q.is_cuda and (sees is not None or q.dtype not in HALVES):
            # Flash supports neither masks nor fp32, the efficient kernel no grouped heads, and `math` materialises
            # all scores.
            keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (keys, values))
            grouped = False
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=sees,
            is_causal=group.causal and not before,
            scale=scale,
            enable_gqa=grouped,
        )
        for i, part in zip(own, out.split([pieces[i].length for i in own], dim=2), strict=True):
            outs[i] = part
    return _gathered(outs)


def _gathered(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def dense(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    sees, fully_masked, queries, keys = _dense_mask(plan)
    grouped = bool(q.shape[-2] != k.shape[-2])
    q_lines, k_lines, v_lines = (
        _padded(x, len(sizes), max(sizes), places)
        for x, sizes, places in ((q, plan.query_sizes, queries), *((x, plan.key_sizes, keys) for x in (k, v)))
    )
    out = F.scaled_dot_product_attention(
        q_lines, k_lines, v_lines, attn_mask=sees, scale=scale, enable_gqa=grouped
    ).transpose(1, 2)
    if fully_masked is not None:
        out = out.masked_fill(fully_masked, 0)
    return out if q.ndim == 4 else _take(out.flatten(0, 1), queries)


class _Mask(NamedTuple):
    """The arguments of a call with a mask, besides q, k and v.

    sees          bool [B, 1, Lq, Lk]: the attention mask
    fully_masked  bool [B, Lq, 1, 1]: rows to set to 0; None: there are none
    queries       int64: index of every packed query row in the padded [B * Lq] rows; None: no padding is needed
    keys          int64: likewise of every key row in [B * Lk]
    """

    sees: Tensor
    fully_masked: Tensor | None
    queries: Tensor | None
    keys: Tensor | None


def _padded(x: Tensor, lines: int, length: int, places: Tensor | None) -> Tensor:
    """Return x as [B, H, L, d].

    Packed rows are scattered with one index: padding sample by sample takes longer than a small attention itself.
    """
    if x.ndim == 3:
        if places is not None:
            spread = _put if transformed() else _Spread.apply
            x = spread(x, places, lines * length)
        x = x.unflatten(0, (lines, length))
    return x.transpose(1, 2)


@torch.compiler.disable
def _dense_mask(plan: AttentionPlan) -> _Mask:
    return _mask_of(plan)


@outside_of_modes
def _mask_of(plan: AttentionPlan) -> _Mask:
    """Return the mask and the positions of packed rows in the padded batch.

    Torch's CPU kernel returns 0 for a fully masked row. On other devices its softmax may be NaN, so the row attends to
    the first key, and its output is replaced.
    """
    lines = np.zeros((len(plan.samples), max(plan.query_sizes), max(plan.key_sizes)), dtype=bool)
    for line, sample, size in zip(lines, plan.samples, plan.key_sizes, strict=True):
        own = _of_short(sample) if size <= SHORT else allowed(sample).numpy()
        line[: own.shape[0], : own.shape[1]] = own
    sees = torch.from_numpy(lines)
    fully_masked = ~sees.any(-1, keepdim=True)
    if plan.device.type == "cpu":
        rows = torch.arange(sees.shape[1])[None, :, None]
        fully_masked &= rows < torch.tensor(plan.query_sizes)[:, None, None]  # rows beyond are dropped at the end
    else:
        sees[..., :1] |= fully_masked

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else on_device(x, plan.device)

    return _Mask(
        on_device(sees[:, None], plan.device),
        moved(fully_masked[..., None] if bool(fully_masked.any()) else None),
        moved(_places(plan.query_sizes)),
        moved(_places(plan.key_sizes)),
    )


@functools.lru_cache(maxsize=512)
def _of_short(sample: tuple[AttentionSpan, ...]) -> np.ndarray:
    """Return the mask of a short sample. The cache is at most 32 MiB; lengths recur, and making a mask takes 0.2 ms."""
    return allowed(sample).numpy()


def _places(sizes: Sequence[int]) -> Tensor | None:
    """Return the positions of packed rows in a batch padded to the longest sample; None if all have equal length."""
    longest = max(sizes)
    if min(sizes) == longest:
        return None
    return torch.cat([torch.arange(i * longest, i * longest + size) for i, size in enumerate(sizes)])


# ---- FlexAttention ----


def flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    rows = _flat(q)
    queries, unpadded, blocks = _blocks(plan)
    packed = [_take(rows, queries), _take(_flat(k), unpadded), _take(_flat(v), unpadded)]
    packed = [x.transpose(0, 1)[None] for x in packed]
    on_gpu = q.device.type == "cuda" and not torch.compiler.is_compiling()
    run: Any = _compiled(flex_attention) if on_gpu else flex_attention
    out = run(*packed, block_mask=blocks, scale=scale, enable_gqa=bool(q.shape[-2] != k.shape[-2]))
    return _put(out[0].transpose(0, 1), queries, rows.shape[0]).view(q.shape)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@torch.compiler.disable
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


IMPLS: dict[str, Callable[..., Any]] = {
    **{impl: functools.partial(_flash, impl) for impl in MODULES},
    **{"varlen": varlen, "cudnn": cudnn, "sdpa": sdpa, "flex": flex, "dense": dense},
}


# ---- conditions ----


def unusable(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool = False,
    torch_deterministic: bool = False,
) -> str | None:
    """Return why an impl cannot run on such tensors; None if it can.

    Args:
        name: The impl.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        head_dim: Channels per head.
        deterministic: The gradient must be bit-identical in every run.
        torch_deterministic: torch.use_deterministic_algorithms is on without warn_only.
    """
    if name in (*MODULES, "varlen", "cudnn"):
        if device.type != "cuda":
            return f"the tensors are on {device.type}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if name == "varlen" and (missing := {"window_size", "scale"} - varlen_parameters()):
            return f"varlen_attn of torch {torch.__version__} has no {' and no '.join(sorted(missing))}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or newer"
        if dtype not in HALVES:
            return f"it supports bf16 and fp16, the tensors are {str(dtype).removeprefix('torch.')}"
        largest = 128 if name == "cudnn" else 256
        if head_dim % 8 or head_dim > largest:
            return f"it supports head dimensions that are multiples of 8 up to {largest}, got {head_dim}"
        if name in MODULES:
            reason = flash_problem(name, torch.cuda.get_device_capability(device), head_dim, deterministic)
            if reason is not None:
                return reason
    if deterministic and name == "cudnn":
        return "torch has no deterministic gradient with cuDNN"
    torchs = ("varlen", "sdpa", "dense")
    if deterministic and not torch_deterministic and device.type == "cuda" and name in torchs:
        return "its gradient is deterministic only under torch.use_deterministic_algorithms(True) without warn_only"
    if name == "flex" and device.type != "cuda":
        return f"it has no backward on {device.type}"
    return None
