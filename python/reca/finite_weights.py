"""Weights that hold NaN or infinity, which training cannot mend and from which images are noise."""

import torch
from torch import Tensor, nn

from reca.models.common.deferred_weights import local_part


@torch.no_grad()
def check_finite(module: nn.Module) -> None:
    """Raise ValueError where parameters of a model, or this rank's part of them, hold NaN or infinity; buffers: NaN.

    It reads every number once, and waits for the GPU once.
    """
    tensors = {name: local_part(p) for name, p in module.named_parameters() if not p.is_meta}
    tensors |= {name: b for name, b in module.named_buffers() if b.is_floating_point() and not b.is_meta}
    if not tensors:
        return
    device = next(iter(tensors.values())).device
    # One of them makes the sum so. A sum may also overflow, so what it tells is looked at.
    sums = torch.stack(
        [
            t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32).to(device, torch.float64)
            for t in tensors.values()
        ]
    )
    suspects = [name for name, sound in zip(tensors, sums.isfinite().tolist(), strict=True) if not sound]
    parameters = {name for name, _ in module.named_parameters()}
    bad = [name for name in suspects if _is_bad(tensors[name], name in parameters)]
    if bad:
        raise ValueError(
            f"the weights hold NaN or infinity in {len(bad)} tensors, the first {bad[0]}: their file is damaged, or "
            "the training that wrote it had diverged. Fetch it again, or name other weights"
        )


def _is_bad(tensor: Tensor, is_parameter: bool) -> bool:
    """Tell whether a tensor holds NaN; of a parameter, infinity too. A buffer may be a mask."""
    return bool((~tensor.isfinite()).any() if is_parameter else tensor.isnan().any())
