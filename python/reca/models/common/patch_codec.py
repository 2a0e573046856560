"""A linear autoencoder of pixel patches, fitted in closed form: the toy datasets' codec in place of a trained one."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.options.fields import count


@dataclass
class PatchSizes:
    """Recipe keys of a PatchCodec."""

    size: int = count(4, "pixels per latent in height and width")
    channels: int = count(16, "channels of a latent")


class PatchCodec(nn.Module):
    """A codec whose latents are the first `channels` principal components of p x p pixel patches. No gradient.

    It runs in fp32 regardless of autocast.

    mean   fp32 [3 p²]
    basis  fp32 [3 p², channels], orthonormal columns; random until `fit`
    scale  fp32 [channels], factor of each component
    """

    def __init__(self, size: int, channels: int):
        super().__init__()
        width = 3 * size**2
        if not 0 < channels <= width:
            raise ValueError(f"patches of {size} x {size} pixels have 1 to {width} latent channels, not {channels}")
        self.factor, self.channels = size, channels
        self.mean = nn.Parameter(torch.zeros(width))
        self.basis = nn.Parameter(torch.linalg.qr(torch.randn(width, channels))[0].contiguous())
        self.scale = nn.Parameter(torch.ones(channels))

    @torch.no_grad()
    def fit(self, pixels: Tensor) -> None:  # [B, 3, H, W] in [-1, 1]
        """Fit mean and components to these images.

        Latents get the square roots of the components' standard deviations, scaled to a mean square of 1.
        """
        patches = self._patches(pixels).flatten(0, 1).double()
        mean = patches.mean(0)
        variances, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        variances = variances[-self.channels :].flip(0)
        self.mean.copy_(mean)
        self.basis.copy_(vectors[:, -self.channels :].flip(1))
        self.scale.copy_(variances**-0.25 / variances.sqrt().mean().sqrt())

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Encode pixels to latents, [B, channels, H / p, W / p]."""
        with torch.autocast(pixels.device.type, enabled=False):
            rows = (self._patches(pixels) - self.mean) @ (self.basis * self.scale)
        return rows.transpose(1, 2).unflatten(2, (pixels.shape[2] // self.factor, -1))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # [B, channels, h, w]
        """Decode latents to pixels, [B, 3, h p, w p] in about [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents.flatten(2).transpose(1, 2) @ (self.basis / self.scale).T + self.mean
        height, width = (side * self.factor for side in latents.shape[2:])
        return F.fold(rows.transpose(1, 2), (height, width), self.factor, stride=self.factor)

    def _patches(self, pixels: Tensor) -> Tensor:
        """Cut pixels into patches, [B, n, 3 p²], row-major."""
        return F.unfold(pixels, self.factor, stride=self.factor).transpose(1, 2)
