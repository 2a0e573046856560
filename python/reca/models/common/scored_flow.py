"""SRUM's loss (arXiv 2510.12784): flow matching with a signed reward per token, and a constraint term.

    sum over tokens of  R |v - (eps - x0)|^2 + c |v - (eps - y0)|^2

x0 is an image that the model generated; its noised latents are the input. R, in [-1, 1], is the reward of each token:
where it is negative, the prediction is pushed away from x0. y0 is the target of the constraint, x0 by default, and c is
its weight.

A fused kernel would save little: prediction and targets are a few values per token, where the model's activations are
thousands per token and layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca.data.tasks import Scored
from reca_kernels import Philox, flow_matching_add_noise

Images = Tensor | Sequence[Tensor]  # [B, C, H, W], or B times [C, H, W]


def token_rewards(said: Scored, height: int, width: int) -> Tensor:
    """Compute the reward of each token of a height x width grid, fp32 [height * width], row-major.

    A box covers the tokens whose centre lies in it, and at least one. Where boxes overlap, the highest score counts.
    Tokens outside all boxes get the background's score.
    """
    rewards = torch.full((height, width), -torch.inf, dtype=torch.float32)
    for box in said.boxes:
        top, bottom = _covered(box.top, box.bottom, height)
        left, right = _covered(box.left, box.right, width)
        rewards[top:bottom, left:right].clamp_(min=box.score)
    return rewards.masked_fill_(rewards.isinf(), said.background).flatten()


def _covered(first: float, last: float, tokens: int) -> tuple[int, int]:
    """Return the range [start, end) of tokens whose centre lies between `first` and `last`, as fractions of a side."""
    start = min(round(first * tokens), tokens - 1)
    return start, max(start + 1, round(last * tokens))


def scored_flow_loss(
    velocity: Tensor,  # the prediction, shaped like the result of flow_matching_add_noise
    x0: Images,
    target: Images | None,
    noise: Philox,
    rewards: Tensor,  # broadcastable to velocity
    constraint: float,
    patch: int = 1,
) -> Tensor:
    """Return the loss of every element, shaped like velocity; fp32, or fp64 for fp64 latents."""
    clean = _clean(x0, noise, patch)
    eps = flow_matching_add_noise(x0, _level(x0, 1.0), noise, patch=patch, out_dtype=clean.dtype)
    error = (velocity - (eps - clean)).square()
    if target is None:
        return (rewards + constraint) * error
    held = (velocity - (eps - _clean(target, noise, patch))).square()
    return rewards * error + constraint * held


def _clean(images: Images, noise: Philox, patch: int) -> Tensor:
    """Return the images in the prediction's layout: noised at t = 0."""
    dtype = torch.float64 if images[0].dtype == torch.float64 else torch.float32
    return flow_matching_add_noise(images, _level(images, 0.0), noise, patch=patch, out_dtype=dtype)


def _level(images: Images, t: float) -> Tensor:
    return torch.full((len(images),), t, dtype=torch.float32, device=images[0].device)
