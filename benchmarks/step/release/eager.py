"""Code shared by several of the released formulations."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

UNPADDED = "reca_released_unpadded"


def unpadded(
    module: nn.Module,
    query: Tensor,  # [B, H, L, d]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    valid: Tensor,  # bool [B, L], False where a row is padding
    **_: object,
) -> tuple[Tensor, None]:
    """Compute causal attention like FlashAttention's padded interface: gather valid rows, attend, scatter."""
    batch, heads, length, width = query.shape
    indices = valid.flatten().nonzero()[:, 0]
    sizes = valid.sum(1).tolist()
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, width)[indices] for x in (query, key, value))
    pieces = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in sample), is_causal=True, enable_gqa=heads != key.shape[1]
        )[0].transpose(0, 1)
        for sample in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    ]
    out = q.new_zeros(batch * length, heads, width)
    out[indices] = torch.cat(pieces)
    return out.unflatten(0, (batch, length)), None


AttentionInterface.register(UNPADDED, unpadded)


class NewGELU(nn.Module):
    """Tanh-approximated GELU, composed of elementary operators."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


def recompute(block: nn.Module, reentrant: bool) -> None:
    """Apply activation checkpointing to a layer, in place."""
    forward = block.forward

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(lambda *rows: forward(*rows, **kwargs), *args, use_reentrant=reentrant)

    block.forward = again


def extended(kind: Callable[..., Any], made: Any, **more: Any) -> Any:
    """Return an instance of a subclass of Prepared, with the fields of ours and further ones."""
    return kind(**{f.name: getattr(made, f.name) for f in fields(made) if f.init}, **more)


def mean_squares(pred: Tensor, target: Tensor) -> Tensor:
    """Return squared errors in fp32."""
    pred = pred.float()  # fp64 in a run of fp64; before torch 2.13 both have to be of one type for the gradient
    return F.mse_loss(pred, target.to(pred.dtype), reduction="none")
