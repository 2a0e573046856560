"""Copies from the host to a GPU that nobody waits for."""

import torch
from torch import Tensor


def on_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`.

    A plain `x.to(device)` of host memory waits until the GPU has done all it was given before. From pinned memory the
    copy stands in the GPU's queue instead, and the pinned block is used again once it is through.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
