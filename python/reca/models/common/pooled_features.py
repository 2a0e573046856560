"""`model.understanding=efficientnet`: h_v computed from EfficientNet-Lite0's pooled features."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.models.common.efficientnet import FEATURES, EfficientNetLite0, imagenet_weights
from reca.models.common.weight_files import assign_state_dict
from reca.options.fields import count, pixels

PUBLISHED = ("imagenet",)  # published weights of the encoder


@dataclass
class EfficientNetSizes:
    image_size: int = pixels(224, "size in pixels of EfficientNet-Lite0's input image")
    tokens: int = count(4, "tokens of h_v that the projector computes from the pooled features")
    token_size: int = count(64, "width of these tokens before the projector's MLP")


def projector(width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))


class PooledProjector(nn.Module):
    """Split pooled features into tokens with a linear layer, and project each token with an MLP.

    mean, scale  mean and standard deviation of the features over the pre-training images; set by `fit`
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, sizes: EfficientNetSizes, width: int):
        super().__init__()
        self.tokens = sizes.tokens
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))
        self.split = nn.Linear(FEATURES, sizes.tokens * sizes.token_size)
        self.mlp = projector(sizes.token_size, width)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:  # [n, FEATURES]
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0) + 1e-2)

    def forward(self, features: Tensor) -> Tensor:  # [B, FEATURES]
        """Return tokens of h_v, [B, n, H]."""
        normed = ((features - self.mean) / self.scale).to(self.split.weight.dtype)
        tokens = self.split(normed).unflatten(1, (self.tokens, -1))
        return self.mlp(F.rms_norm(tokens, tokens.shape[-1:]))


def assign_weights(encoder: EfficientNetLite0, source: str) -> None:
    """Load the ImageNet weights into the encoder. source: for error messages. Raises ValueError if they are missing."""
    assign_state_dict(encoder, imagenet_weights(), source, torch.float32)


def pooled(encoder: nn.Module, pixels: Tensor, sizes: EfficientNetSizes) -> Tensor:  # [B, 3, R, R] in [-1, 1]
    """Compute the pooled features of square images of any size, fp32 [B, FEATURES]."""
    return encoder(resized(pixels, sizes.image_size))


def resized(pixels: Tensor, size: int) -> Tensor:  # [B, 3, R, R] in [-1, 1]
    """Resize images to `size` x `size` pixels, clamped to [-1, 1]."""
    return F.interpolate(pixels, [size] * 2, mode="bicubic", antialias=True).clamp(-1, 1)
