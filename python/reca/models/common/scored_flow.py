"""SRUM's loss (arXiv 2510.12784): flow matching with a signed weight per token, and a second target that holds it.

    sum over tokens of  R |v - (eps - x0)|^2 + c |v - (eps - y0)|^2

x0 is an image that the model has drawn, and its noisy form is the input. R, from -1 to 1, says how right each token of
it is: below 0 the prediction moves away. y0 is an image to stay near, by default x0, and c how strongly.

A kernel of its own would save nothing: prediction and targets are a few values a token, where the model holds thousands
a token and layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca.data.tasks import Scored
from reca_kernels import Philox, flow_matching_add_noise

Images = Tensor | Sequence[Tensor]  # [B, C, H, W], or B times [C, H, W]


def token_rewards(said: Scored, height: int, width: int) -> Tensor:
    """Score the height x width tokens of an image, fp32 [height width].

    A box covers the tokens whose centre lies in it, and at least one. Where boxes overlap, the highest score counts.
    """
    rewards = torch.full((height, width), -torch.inf, dtype=torch.float32)
    for box in said.boxes:
        top, bottom = _covered(box.top, box.bottom, height)
        left, right = _covered(box.left, box.right, width)
        rewards[top:bottom, left:right].clamp_(min=box.score)
    return rewards.masked_fill_(rewards.isinf(), said.background).flatten()


def _covered(first: float, last: float, tokens: int) -> tuple[int, int]:
    """Return the range of tokens whose centre lies from `first` to `last`, fractions of a side."""
    start = min(round(first * tokens), tokens - 1)
    return start, max(start + 1, round(last * tokens))


def scored_flow_loss(
    velocity: Tensor,  # shaped like flow_matching_add_noise's result
    x0: Images,
    target: Images | None,
    noise: Philox,
    rewards: Tensor,  # broadcast to velocity
    constraint: float,
    patch: int = 1,
) -> Tensor:
    """Return the loss of every element, shaped like velocity; fp32, or fp64 where the latents are."""
    clean = _clean(x0, noise, patch)
    eps = flow_matching_add_noise(x0, _level(x0, 1.0), noise, patch=patch, out_dtype=clean.dtype)
    error = (velocity - (eps - clean)).square()
    if target is None:
        return (rewards + constraint) * error
    held = (velocity - (eps - _clean(target, noise, patch))).square()
    return rewards * error + constraint * held


def _clean(images: Images, noise: Philox, patch: int) -> Tensor:
    """Return images in the order of the prediction: their noisy form at level 0."""
    dtype = torch.float64 if images[0].dtype == torch.float64 else torch.float32
    return flow_matching_add_noise(images, _level(images, 0.0), noise, patch=patch, out_dtype=dtype)


def _level(images: Images, t: float) -> Tensor:
    return torch.full((len(images),), t, dtype=torch.float32, device=images[0].device)
