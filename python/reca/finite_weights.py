"""Weights that hold NaN or infinity, which training cannot mend and from which images are noise."""

import torch
from torch import Tensor, nn

from reca.models.common.deferred_weights import local_part

PIECE = 2**24  # numbers that are added up at a time: on a CPU, bf16 is copied to fp32 for it


@torch.no_grad()
def check_finite(module: nn.Module) -> None:
    """Raise ValueError where parameters of a model, or this rank's part of them, hold NaN or infinity; buffers: NaN.

    It reads every number once, and waits for the GPU once.
    """
    parameters = {name: local_part(p) for name, p in module.named_parameters() if not p.is_meta}
    buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point() and not b.is_meta}
    tensors = parameters | buffers
    if not tensors:
        return
    device = next(iter(tensors.values())).device
    sums = torch.stack([_sum(tensor).to(device, torch.float64) for tensor in tensors.values()])
    suspects = [name for name, sound in zip(tensors, sums.isfinite().tolist(), strict=True) if not sound]
    # A sum may overflow, and a buffer may be a mask of infinities.
    bad = [n for n in suspects if (buffers[n].isnan().any() if n in buffers else not parameters[n].isfinite().all())]
    if bad:
        raise ValueError(
            f"the weights hold NaN or infinity in {len(bad)} tensors, the first {bad[0]}: their file is damaged, or "
            "the training that wrote it had diverged. Fetch it again, or name other weights"
        )


def _sum(tensor: Tensor) -> Tensor:
    """Add up all numbers: NaN or infinite if one of them is."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.stack([part.sum(dtype=dtype) for part in tensor.reshape(-1).split(PIECE)]).sum()
