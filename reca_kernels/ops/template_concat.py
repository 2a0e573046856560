"""Template tokens, visual embeddings and additive rows, written once into one sequence of embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca_kernels.reference import template_concat as reference


def template_concat(
    table: Tensor,  # [V, D]
    visual: Tensor,  # [Nv, D] or [B, n, D]
    src: Tensor,  # [..., L] int32 or int64
    *,
    adds: Sequence[tuple[Tensor, Tensor]] = (),  # rows [K, D], index [..., L]
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:  # [..., L, D]
    return reference.template_concat(table, visual, src, adds=adds, out_dtype=out_dtype)
