"""Detection of NaN and infinity in weights: training cannot recover from them, and images are noise."""

import torch
from torch import Tensor, nn

from reca.models.common.deferred_weights import local_part

PIECE = 2**24  # elements that are summed at a time: on a CPU, bf16 is copied to fp32 for it


@torch.no_grad()
def check_finite(module: nn.Module) -> None:
    """Raise ValueError if parameters, or this rank's shards of them, contain NaN or infinity, or buffers NaN.

    Synchronises with the GPU once if all are sound.
    """
    parameters = {name: local_part(p) for name, p in module.named_parameters() if not p.is_meta}
    buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point() and not b.is_meta}
    tensors = parameters | buffers
    if not tensors:
        return
    device = next(iter(tensors.values())).device
    sums = torch.stack([_sum(tensor).to(device, torch.float64) for tensor in tensors.values()])
    suspects = [name for name, sound in zip(tensors, sums.isfinite().tolist(), strict=True) if not sound]
    # The sum of finite numbers may overflow, and a buffer may be a mask with infinities.
    bad = [n for n in suspects if (buffers[n].isnan().any() if n in buffers else not parameters[n].isfinite().all())]
    if bad:
        raise ValueError(
            f"the weights contain NaN or infinity in {len(bad)} tensors, the first {bad[0]}: their file is damaged, or "
            "the training that wrote it had diverged. Fetch it again, or name other weights"
        )


def _sum(tensor: Tensor) -> Tensor:
    """Sum all elements: the result is NaN or infinite if one of them is."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.stack([part.sum(dtype=dtype) for part in tensor.reshape(-1).split(PIECE)]).sum()
