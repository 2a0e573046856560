"""Attention of rows that attend to spans of other rows: a few FlashAttention calls, no dense mask at real size."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks
from reca_kernels.attention.flash_functions import problems
from reca_kernels.attention.implementations import IMPLS, unusable
from reca_kernels.attention.order import basis, order
from reca_kernels.attention.plan import AttentionPlan, AttentionSpan, QueryGroup, attention_plan, total
from reca_kernels.attention.rows import has_hidden, shielded
from reca_kernels.memory import plain

OP = "attention"
# What has run in this process: kind of device, impl, dtype, channels of a head.
_RAN: set[tuple[str, str, torch.dtype, int]] = set()

# CPU cost model: a dense mask computes masked pairs too; a call per query group pays its overhead. Nanoseconds, forward
# and backward, of one pair in one channel of one head, and of one more call. Torch's CPU kernel skips what is above a
# diagonal in blocks.
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

    The result is exact: every row is in one call with all its keys, so nothing is merged. Rows of padding get 0 and
    give no gradient. NaN and infinity in rows that no other row attends to (noise and padding) reach no other row; on
    GPUs and under torch.compile the gradient of noise that holds them reaches what the noise attends to.

    Shapes         packed: the rows of all samples, one sample after another; padded: a line per sample, whose spans
                   say where its padding is. Hq is a multiple of Hk; query head h reads key head h * Hk // Hq.
    prefix         keys and values of the plan's cached spans, [Tp, Hk, d] or [B, Lp, Hk, d]; k and v are then of the
                   other spans. Without it k and v hold the rows of all spans. A prefix made under no_grad gets no
                   gradient, and the result is exact.
    scale          default 1 / sqrt(d)
    impl           "auto", "fa4", "fa3", "fa2", "varlen", "cudnn", "sdpa", "flex" or "dense" (see implementations.py);
                   default: the environment variable RECA_ATTENTION, else auto. A forced one raises RuntimeError where
                   it cannot run.
    deterministic  the gradient has the same bits in every run. Where no impl has such a one it raises RuntimeError.
                   Default: whether torch.use_deterministic_algorithms is on without warn_only.

    Under autocast q, k and v are cast as torch's attention casts them. Raises ValueError or TypeError for tensors that
    do not fit the plan or each other.
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
    forced = impl or os.environ.get("RECA_ATTENTION") or "auto"
    name = _choose(q.device, q.dtype, int(q.shape[-1]), deterministic, forced)
    if not any(plan.groups):  # no row sees anything
        return q.masked_fill(q.new_ones((), dtype=torch.bool), 0)
    if forced == "auto" and q.is_cpu and not torch.compiler.is_compiling():  # a graph would break at the mask
        name = "dense" if dense_is_faster(plan, *map(int, q.shape[-2:])) else name
    if raw:
        _RAN.add((q.device.type, name, q.dtype, int(q.shape[-1])))
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return IMPLS[name](q, k, v, plan, scale, deterministic)

    # The groups of a compiled graph keep hidden rows apart forward; only dense has to be shielded there.
    if (name == "dense" or (q.is_cpu and not torch.compiler.is_compiling())) and has_hidden(plan):
        return shielded(run, q, k, v, plan, raw)
    return run(q, k, v)


def _laid_out(x: Tensor) -> Tensor:
    """Give a zero tensor memory: torch's attention reads beyond its only element."""
    return torch.where(x.new_ones((), dtype=torch.bool), x, 0) if x._is_zerotensor() else x


def _after(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, ...]:
    """Return keys and values of all spans: per sample the prefix and what comes behind."""
    joined = []
    for name, old, new in (("k", prefix[0], k), ("v", prefix[1], v)):
        if (old.ndim, old.shape[-2:], old.dtype, old.device) != (new.ndim, new.shape[-2:], new.dtype, new.device):
            raise ValueError(
                f"{OP}: the prefix of {name} is {_told(old)}, but {name} is {_told(new)}; only their rows may differ"
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
        raise TypeError(f"{OP}: q, k and v must be of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{OP}: {q.shape[-2]} query heads are no multiple of {k.shape[-2]} key heads")
    for name, x, sizes in (("query", q, plan.query_sizes), ("key", k, plan.key_sizes)):
        if x.ndim == 4 and (x.shape[0] != len(sizes) or any(size != x.shape[1] for size in sizes)):
            lines = f"{len(sizes)} samples of {', '.join(map(str, sorted(set(sizes))))} {name} rows"
            raise ValueError(
                f"{OP}: the plan has {lines}, but the tensors have {x.shape[0]} of {x.shape[1]}. In a padded batch "
                "every sample that is shorter than a line needs a pad span"
            )
        if x.ndim == 3 and x.shape[0] != sum(sizes):
            raise ValueError(f"{OP}: the plan has {sum(sizes)} {name} rows, but the tensors have {x.shape[0]}")
    if plan.device.type != q.device.type or plan.device.index not in (None, q.device.index):
        raise ValueError(f"{OP}: the plan is for {plan.device}, but q is on {q.device}; use plan.to(q.device) once")


@functools.lru_cache(maxsize=32)
def dense_is_faster(plan: AttentionPlan, heads: int, head_dim: int) -> bool:
    """Return whether on a CPU one call with a mask takes less time than a call per query group."""
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


@torch.compiler.assume_constant_result  # torch's guards trace again when it changes
def _torch_is_deterministic() -> bool:
    """Return whether torch runs deterministic algorithms only; with warn_only it runs others, too, and says so."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@torch.compiler.assume_constant_result  # a compiled graph keeps the choice that was made when it was traced
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
        device: Where the tensors are.
        dtype: Of the tensors.
        head_dim: Channels per head.
        deterministic: The gradient must have the same bits in every run.
        forced: An impl by name, or "auto".
        torch_deterministic: torch.use_deterministic_algorithms is on without warn_only.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: Where a forced impl cannot run, or none of auto's has a deterministic gradient.
    """
    asked = (device, dtype, head_dim, deterministic, torch_deterministic)
    if forced == "auto":
        reasons = {}
        for name in order(device):
            if not (reason := unusable(name, *asked)):
                return name
            reasons[name] = reason
        # sdpa runs everywhere, but for a deterministic gradient.
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"{OP}: deterministic=True, and nothing here has such a gradient ({why})")
    if forced not in IMPLS:
        raise ValueError(f"{OP}: unknown impl {forced!r}; expected auto, {', '.join(IMPLS)}")
    if reason := unusable(forced, *asked):
        raise RuntimeError(
            f"{OP}: impl '{forced}' was asked for, but {reason}. A forced impl never falls back; "
            "see reca_kernels.backend_report()"
        )
    return forced


def report(devices: Sequence[str]) -> list[str]:
    """Return lines of the backend report.

    They say what bf16 tensors of 64 channels run on, and why not on what is better; and, whatever the device, what is
    installed and cannot be imported.
    """
    return [*map(_reported, devices), *(f"{OP}: {problem}; reinstall or remove it" for problem in problems())]


def _reported(device: str) -> str:
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    asked: tuple[Any, ...] = (where, torch.bfloat16, 64, False)
    chosen = choose(*asked)
    why = [f"{name}: {reason}" for name in IMPLS if (reason := unusable(name, *asked))]
    more = ", dense for small batches" if device == "cpu" else f", {basis(where)}"
    return f"{OP} on {device}: {chosen}{more}" + (f"  (not {'; '.join(why)})" if why else "")


def forget_ran() -> None:
    """Begin the list of `ran` anew."""
    _RAN.clear()


def ran(device_type: str) -> list[str]:
    """List what attention has run on since `forget_ran`, on a kind of device: "fa3 (bfloat16, 64 channels a head)"."""
    found = sorted((name, str(dtype).removeprefix("torch."), d) for kind, name, dtype, d in _RAN if kind == device_type)
    return [f"{name} ({dtype}, {d} channels a head)" for name, dtype, d in found]


def trial(device: torch.device) -> str:
    """Run what bf16 tensors of 64 channels get, forward and backward, and the masked one. Returns what came of it."""
    name = choose(device, torch.bfloat16, 64, False)
    try:
        results = [_trial(impl, device) for impl in (name, "dense")]
    except Exception as error:  # of a kernel, a driver or a package: of any kind
        return f"{name} FAILS: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    said = "agrees with" if off < 0.02 else "DIFFERS from"
    return f"{name} ran forward and backward and {said} the masked one (relative difference {off:.1g})"


def _trial(impl: str, device: torch.device) -> list[Tensor]:
    """Return result and gradients of a layout of causal and full rows."""
    plan = attention_plan([[AttentionSpan(3), AttentionSpan(70, "full"), AttentionSpan(60)]] * 2, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(266, heads, 64, generator=generator).bfloat16().to(device) for heads in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, plan, impl=impl)
    return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, grad))]
