"""Codecs with a Gaussian posterior over latents: diffusers' KL autoencoder, and pixel patches in its place.

A codec has `factor`, pixels per latent in height and width; `channels` per latent; `encode(pixels) -> moments`;
`latents(moments, noise)`; and `decode(latents) -> pixels`. Moments are mean and log-variance, [2 C, h, w] per image.
"""

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from reca.models.common.patch_codec import PatchCodec

CERTAIN = -60.0  # log-variance of a deterministic latent
GROUPS = 32  # groups of every GroupNorm


class AutoencoderSizes(Protocol):
    """Recipe keys that an autoencoder is built from."""

    block_out_channels: list[int]
    layers_per_block: int
    latent_channels: int
    scaling_factor: float


class KlCodec(nn.Module):
    """A KL autoencoder that runs in fp32 regardless of autocast.

    shift: subtracted from latents before scaling. quant_convs: has 1 x 1 convolutions before and after the latent.
    """

    def __init__(self, sizes: AutoencoderSizes, *, shift: float = 0.0, quant_convs: bool):
        super().__init__()
        self.sizes, self.shift, self.channels = sizes, shift, sizes.latent_channels
        levels = len(sizes.block_out_channels)
        self.factor = 2 ** (levels - 1)
        self.autoencoder = AutoencoderKL(
            block_out_channels=tuple(sizes.block_out_channels),
            layers_per_block=sizes.layers_per_block,
            latent_channels=sizes.latent_channels,
            norm_num_groups=GROUPS,
            use_quant_conv=quant_convs,
            use_post_quant_conv=quant_convs,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )

    def public_config(self) -> dict[str, Any]:
        """Return the autoencoder's configuration for diffusers."""
        return {"_class_name": "AutoencoderKL", **self.autoencoder.config, "scaling_factor": self.sizes.scaling_factor}

    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        with torch.autocast(pixels.device.type, enabled=False):
            moments = self.autoencoder.encoder(pixels.float())
            return moments if self.autoencoder.quant_conv is None else self.autoencoder.quant_conv(moments)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:  # [..., 2 C, h, w], [..., C, h, w]
        """Sample the posterior with `noise`, or return its mean if `noise` is None; shifted and scaled."""
        mean, log_variance = moments.float().chunk(2, dim=-3)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return self.sizes.scaling_factor * (z - self.shift)

    def decode(self, latents: Tensor) -> Tensor:  # [B, C, h, w]
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float() / self.sizes.scaling_factor + self.shift
            given = self.autoencoder.post_quant_conv
            return self.autoencoder.decoder(z if given is None else given(z))


class PatchMoments(PatchCodec):
    """A PatchCodec that returns moments with a constant log-variance: the codec of the toy datasets."""

    def encode(self, pixels: Tensor) -> Tensor:
        mean = super().encode(pixels.float())
        return torch.cat((mean, torch.full_like(mean, CERTAIN)), dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_variance = moments.float().chunk(2, dim=-3)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise
