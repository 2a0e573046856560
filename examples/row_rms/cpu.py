"""The kernel for CPUs. In a real op this file passes addresses to a launcher of csrc/row_rms."""

import torch
from torch import Tensor


def forward(x: Tensor, out: Tensor) -> None:
    torch.linalg.vector_norm(x.float(), dim=1, out=out)
    out.div_(x.shape[1] ** 0.5)
