"""Attention in which rows attend to spans of other rows: a few FlashAttention calls, no dense mask at full size."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, compiling
from reca_kernels.attention.implementations import IMPLS, unusable
from reca_kernels.attention.order import basis, order
from reca_kernels.attention.plan import AttentionPlan, AttentionSpan, QueryGroup, attention_plan, total
from reca_kernels.attention.rows import has_hidden, shielded
from reca_kernels.memory import plain

OP = "attention"
# What has run in this process: device type, impl, dtype, head dimension.
_RAN: set[tuple[str, str, torch.dtype, int]] = set()

# CPU cost model: with a dense mask the masked pairs are computed too; a call per query group has a fixed overhead. The
# costs are nanoseconds, forward and backward, per pair, channel and head, and per additional call. Torch's CPU kernel
# skips blocks above the diagonal of a causal call.
PAIR_NS, CALL_NS, BLOCK = 0.4, 150_000, 512


def attention(
    q: Tensor,  # [Tq, Hq, d] or [B, Lq, Hq, d]
    k: Tensor,  # [Tk, Hk, d] or [B, Lk, Hk, d]
    v: Tensor,  # as k
    plan: AttentionPlan,
    *,
    prefix: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    impl: str | None = None,
    deterministic: bool | None = None,
) -> Tensor:  # as q
    """Compute softmax(scale * q k^T) v over the pairs (row, key) that `plan` allows.

    The result is exact: every row is in one call with all its keys, so no partial results are merged. Padding rows have
    output 0 and contribute no gradient. NaN and infinity in rows that no other row attends to (noise and padding) do
    not reach other rows; on GPUs and under torch.compile, however, a noise row with NaN or infinity passes them in its
    gradient to the rows that it attends to.

    Shapes         packed: the rows of all samples, concatenated; padded: one line per sample, with pad spans for its
                   padding. Hq is a multiple of Hk; query head h reads key head h * Hk // Hq.
    prefix         keys and values of the plan's cached spans, [Tp, Hk, d] or [B, Lp, Hk, d]; k and v are then those of
                   the other spans. Without it k and v contain the rows of all spans. A prefix computed under no_grad
                   gets no gradient; the result is still exact.
    scale          default 1 / sqrt(d)
    impl           "auto", "fa4", "fa3", "fa2", "varlen", "cudnn", "sdpa", "flex" or "dense" (see implementations.py);
                   default: the environment variable RECA_ATTENTION, else auto.
    deterministic  the gradient is bit-identical in every run. Default: whether torch.use_deterministic_algorithms is
                   set without warn_only.

    Derivatives    First derivatives. All of them within torch.nn.attention.sdpa_kernel(SDPBackend.MATH) and impl "sdpa"
                   or "dense": torch's other kernels have none of second order.

    Under autocast q, k and v are cast as in torch's attention.

    Raises:
        ValueError: A shape or device does not match the plan or the other tensors, or the impl is unknown.
        TypeError: q, k or v is not of a float dtype, they differ in dtype, scale is not a number, or plan is not an
            AttentionPlan.
        RuntimeError: The forced impl cannot run here, or no impl has a deterministic gradient.
    """
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"{OP}: plan must be what attention_plan returns, got {type(plan).__name__}")
    if not (raw := plain(q, k, v)):
        checks.dispatchable(OP, q=q, k=k, v=v)
        if not torch.compiler.is_compiling():
            q, k, v = map(_laid_out, (q, k, v))
    checks.floating(OP, q=q, k=k, v=v)
    if dtype := checks.autocast_dtype(q):
        q, k, v = (x.to(dtype) if x.dtype != torch.float64 else x for x in (q, k, v))
        prefix = prefix and (prefix[0].to(q.dtype), prefix[1].to(q.dtype))
    if prefix is not None:
        k, v = _after(prefix, k, v, plan)
    _check(q, k, v, plan)
    deterministic = _torch_is_deterministic() if deterministic is None else deterministic
    forced = impl or _forced()
    name = _choose(q.device, q.dtype, int(q.shape[-1]), deterministic, forced)
    if not any(plan.groups):  # no row attends to anything
        return q.masked_fill(q.new_ones((), dtype=torch.bool), 0)
    if forced == "auto" and q.is_cpu and not torch.compiler.is_compiling():  # making the mask would break a graph
        name = "dense" if dense_is_faster(plan, *map(int, q.shape[-2:])) else name
    if raw:
        _RAN.add((q.device.type, name, q.dtype, int(q.shape[-1])))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    checks.number(OP, scale=scale)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return IMPLS[name](q, k, v, plan, scale, deterministic)

    # In a compiled graph the query groups keep hidden rows apart in the forward pass; only dense needs shielding there.
    if (name == "dense" or (q.is_cpu and not torch.compiler.is_compiling())) and has_hidden(plan):
        return shielded(run, q, k, v, plan, raw)
    return run(q, k, v)


def _forced() -> str:
    return os.environ.get("RECA_ATTENTION") or "auto"


def _laid_out(x: Tensor) -> Tensor:
    """Materialise a zero tensor: torch's attention reads beyond its single element."""
    return torch.where(x.new_ones((), dtype=torch.bool), x, 0) if x._is_zerotensor() else x


def _after(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, ...]:
    """Return keys and values of all spans: per sample the prefix, then the other rows."""
    joined = []
    for name, old, new in (("k", prefix[0], k), ("v", prefix[1], v)):
        if (old.ndim, old.shape[-2:], old.dtype, old.device) != (new.ndim, new.shape[-2:], new.dtype, new.device):
            raise ValueError(
                f"{OP}: the prefix of {name} is {_told(old)}, but {name} is {_told(new)}; only the number of rows may "
                "differ"
            )
        if new.ndim == 4:
            joined.append(torch.cat((old, new), dim=1))
            continue
        cached, others = sum(plan.cached_sizes), sum(plan.query_sizes)
        if (old.shape[0], new.shape[0]) != (cached, others):
            raise ValueError(
                f"{OP}: the plan has {cached} cached and {others} other rows; the prefix of {name} has {old.shape[0]} "
                f"and {name} has {new.shape[0]}"
            )
        pairs = zip(old.split(list(plan.cached_sizes)), new.split(list(plan.query_sizes)), strict=True)
        joined.append(torch.cat([part for pair in pairs for part in pair]))
    return tuple(joined)


def _told(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    if q.ndim not in (3, 4) or k.ndim != q.ndim or k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{OP}: expected q [Tq, Hq, d] with k and v [Tk, Hk, d], or [B, Lq, Hq, d] with [B, Lk, Hk, d]; got "
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"{OP}: q, k and v must have the same dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{OP}: query heads must be a multiple of key heads, got {q.shape[-2]} and {k.shape[-2]}")
    for name, x, sizes in (("query", q, plan.query_sizes), ("key", k, plan.key_sizes)):
        if x.ndim == 4 and (x.shape[0] != len(sizes) or any(size != x.shape[1] for size in sizes)):
            lines = f"{len(sizes)} samples of {', '.join(map(str, sorted(set(sizes))))} {name} rows"
            raise ValueError(
                f"{OP}: the plan has {lines}, but the tensors have {x.shape[0]} of {x.shape[1]}. In a padded batch "
                "every sample that is shorter than the padded length needs a pad span"
            )
        if x.ndim == 3 and x.shape[0] != sum(sizes):
            raise ValueError(f"{OP}: the plan has {sum(sizes)} {name} rows, but the tensors have {x.shape[0]}")
    if plan.device.type != q.device.type or plan.device.index not in (None, q.device.index):
        raise ValueError(f"{OP}: the plan is for {plan.device}, but q is on {q.device}; use plan.to(q.device) once")


@functools.lru_cache(maxsize=32)
def dense_is_faster(plan: AttentionPlan, heads: int, head_dim: int) -> bool:
    """Return whether one call with a mask is faster on a CPU than one call per query group."""
    pairs = len(plan.samples) * max(plan.query_sizes) * max(plan.key_sizes) - sum(map(_computed, plan.groups))
    calls = len(plan.groups[0]) if plan.uniform else sum(map(len, plan.groups))
    return pairs * heads * head_dim * PAIR_NS < (calls - 1) * CALL_NS


@functools.lru_cache(maxsize=4096)
def _computed(groups: tuple[QueryGroup, ...]) -> int:
    """Count the pairs that one sample's calls compute."""
    pairs = 0
    for rows, keys, causal in ((total(one.rows), total(one.keys), one.causal) for one in groups):
        pairs += rows * keys - (rows * (rows - BLOCK) // 2 if causal and rows == keys > BLOCK else 0)
    return pairs


@compiling.assume_constant_result  # torch's guards trigger recompilation when it changes
def _torch_is_deterministic() -> bool:
    """Return whether torch runs only deterministic algorithms; with warn_only it merely warns about others."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@compiling.assume_constant_result  # a compiled graph keeps the choice made when it was traced
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool, forced: str) -> str:
    return choose(device, dtype, head_dim, deterministic, forced, _torch_is_deterministic())


@functools.lru_cache(maxsize=256)
def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool,
    forced: str = "auto",
    torch_deterministic: bool = False,
) -> str:
    """Return the impl that runs on such tensors.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        head_dim: Channels per head.
        deterministic: The gradient must be bit-identical in every run.
        forced: The name of an impl, or "auto".
        torch_deterministic: torch.use_deterministic_algorithms is on without warn_only.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The forced impl cannot run, or no impl that "auto" considers has a deterministic gradient.
    """
    asked = (device, dtype, head_dim, deterministic, torch_deterministic)
    if forced == "auto":
        reasons = {}
        for name in order(device):
            if not (reason := unusable(name, *asked)):
                return name
            reasons[name] = reason
        # sdpa runs everywhere except with deterministic=True.
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"{OP}: deterministic=True, but no impl here has a deterministic gradient ({why})")
    if forced not in IMPLS:
        raise ValueError(f"{OP}: unknown impl {forced!r}; expected auto, {', '.join(IMPLS)}")
    if reason := unusable(forced, *asked):
        raise RuntimeError(
            f"{OP}: impl '{forced}' was asked for, but {reason}. A forced impl never falls back; "
            "see reca_kernels.backend_report()"
        )
    return forced


def default(device: str) -> tuple[str, str, list[str]]:
    """Return the impl for bf16 tensors with head dimension 64, what the choice is based on, and why others cannot run.

    The impl is "none" if the forced one cannot run.
    """
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    asked: tuple[Any, ...] = (where, torch.bfloat16, 64, False)
    if (forced := _forced()) != "auto":
        reason = unusable(forced, *asked) if forced in IMPLS else "there is no such impl"
        by = f"forced by RECA_ATTENTION={forced}"
        return ("none", f"{by}, but {reason}", []) if reason else (forced, by, [])
    more = "dense for small batches" if device == "cpu" else basis(where)
    return choose(*asked), more, [f"{name}: {reason}" for name in IMPLS if (reason := unusable(name, *asked))]


def forget_ran() -> None:
    """Clear the list of `ran`."""
    _RAN.clear()


def ran(device_type: str) -> list[str]:
    """Return the impls that have run since `forget_ran` on a type of device, as "fa3 (bfloat16, head dimension 64)"."""
    found = sorted((name, str(dtype).removeprefix("torch."), d) for kind, name, dtype, d in _RAN if kind == device_type)
    return [f"{name} ({dtype}, head dimension {d})" for name, dtype, d in found]


def trial(device: torch.device) -> str:
    """Run the impl for bf16 tensors with head dimension 64 forward and backward, compare it with dense, and report."""
    name = _forced()
    try:
        name = choose(device, torch.bfloat16, 64, False, name)
        results = [_trial(impl, device) for impl in (name, "dense")]
    except Exception as error:  # a kernel, the CUDA driver or a package may raise anything
        return f"{name} FAILS: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    said = "agrees with" if off < 0.02 else "DIFFERS from"
    return f"{name} ran forward and backward and {said} dense (relative difference {off:.1g})"


def _trial(impl: str, device: torch.device) -> list[Tensor]:
    """Return output and gradients of a layout with causal and full spans."""
    plan = attention_plan([[AttentionSpan(3), AttentionSpan(70, "full"), AttentionSpan(60)]] * 2, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(266, heads, 64, generator=generator).bfloat16().to(device) for heads in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, plan, impl=impl)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, grad))]
