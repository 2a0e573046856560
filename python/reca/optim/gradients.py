"""Global gradient norm, and clipping to it."""

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def gradient_norm(adapter: nn.Module, max_grad_norm: float | None) -> float:
    """Clip the gradients to a global L2 norm of `max_grad_norm` (None: no clipping) and return the norm before.

    Norms of 16-bit gradients are computed in fp32, because fp16 overflows at 65504. Synchronises with the device, since
    whether the step is made depends on the norm. If the norm is clearly below the limit, the gradients are not written:
    clipping would multiply them by 1.
    """
    parameters = [p for p in adapter.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(
        [torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype in HALVES else g for g in gradients]
    )
    total = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if max_grad_norm is not None and not total < 0.99 * max_grad_norm - 1e-6:  # also if it is NaN
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return total
