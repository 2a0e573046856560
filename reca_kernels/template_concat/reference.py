"""Template tokens and visual embeddings in one sequence, in plain PyTorch: the reference implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor


def template_concat(
    table: Tensor,  # [V, D]
    visual: Tensor,  # [Nv, D] or [B, n, D]
    src: Tensor,  # [..., L] int32 or int64
    *,
    adds: Sequence[tuple[Tensor, Tensor]] = (),  # rows [K, D], index [..., L]
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [..., L, D]
    """Compute `reca_kernels.template_concat`. Sums are fp32 (fp64 when an input is fp64) and rounded once."""
    out_dtype = out_dtype or table.dtype
    inputs = [table, visual, *(rows for rows, _ in adds)]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32

    def lookup(rows: Tensor, index: Tensor) -> Tensor:
        """Return the rows at index, and zeros where the index is negative."""
        rows = rows.flatten(0, -2)
        if rows.shape[0] == 0:
            return rows.new_zeros((*index.shape, rows.shape[-1]), dtype=wide)
        found = rows[index.clamp(min=0).long()].to(wide)
        return torch.where((index >= 0)[..., None], found, 0)

    x = lookup(table, src) + lookup(visual, -1 - src)
    for rows, index in adds:
        x = x + lookup(rows, index)
    return x.to(out_dtype)
