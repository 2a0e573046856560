"""Attention by one call of scaled_dot_product_attention with a mask over the padded batch."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reca_kernels import compiling
from reca_kernels.attention.gather import Spread, put, take
from reca_kernels.attention.plan import AttentionPlan, AttentionSpan
from reca_kernels.attention.reference import allowed
from reca_kernels.attention.sdpa import fused
from reca_kernels.host import on_device, outside_of_modes
from reca_kernels.memory import transformed

SHORT = 256  # dense masks of samples with at most this many rows are cached


def dense(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, deterministic: bool) -> Tensor:
    sees, fully_masked, queries, keys = _dense_mask(plan)
    q_lines, k_lines, v_lines = (
        _padded(x, len(sizes), max(sizes), places)
        for x, sizes, places in ((q, plan.query_sizes, queries), *((x, plan.key_sizes, keys) for x in (k, v)))
    )
    out = fused(q_lines, k_lines, v_lines, sees, scale).transpose(1, 2)
    if fully_masked is not None:
        out = out.masked_fill(fully_masked, 0)
    return out if q.ndim == 4 else take(out.flatten(0, 1), queries)


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
            spread = put if transformed() else Spread.apply
            x = spread(x, places, lines * length)
        x = x.unflatten(0, (lines, length))
    return x.transpose(1, 2)


@compiling.disable
@outside_of_modes
def _dense_mask(plan: AttentionPlan) -> _Mask:
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
