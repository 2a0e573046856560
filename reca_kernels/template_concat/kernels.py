"""The functions of a backend of template_concat."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# (rows [K, D], index [T], negated): position t gets row index[t], or row -1 - index[t] if negated, and nothing if that
# is negative. Rows are contiguous; the stride between rows is arbitrary.
Source = tuple[Tensor, Tensor, bool]


class Kernels(Protocol):
    def forward(self, sources: Sequence[Source], out_dtype: torch.dtype) -> Tensor:
        """Return the sum [T, D], accumulated in fp32 in the order of the sources and rounded once.

        The first two sources are the table and the visual rows, with the same index. A row index out of range makes its
        position NaN.
        """

    def backward(
        self,
        grad: Tensor,  # [T, D]
        index: Tensor,  # [T]
        negated: bool,
        count: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the gradient of `count` rows, [count, D], in their dtype.

        It is accumulated in fp32 in a fixed order: that of t on CPUs, that of row_gradients.py on GPUs.
        """
