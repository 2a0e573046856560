"""Reference implementation of row_rms in plain PyTorch."""

from torch import Tensor


def row_rms(x: Tensor) -> Tensor:
    return x.float().square().mean(1).sqrt()
