"""What a backend of template_concat holds."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# (rows [K, D], index [T], negated): position t gets row index[t], or row -1 - index[t] when negated, and nothing where
# that is negative. The elements of a row lie side by side, rows at any distance.
Source = tuple[Tensor, Tensor, bool]


class Kernels(Protocol):
    def forward(self, sources: Sequence[Source], out_dtype: torch.dtype) -> Tensor:
        """Return the sum [T, D], formed in the order of the sources, in fp32, and rounded once.

        The first two sources are the table and the visual rows over the same index. A row that a source does not have
        makes its position NaN.
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

        It adds in fp32 in a fixed order: that of t on CPUs, that of row_gradients.py on GPUs.
        """
