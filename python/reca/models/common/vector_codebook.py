"""A codebook of pixel patches with a vector per entry: the emoji dataset's codec for models that generate latents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reca.models.common.patch_codebook import PatchCodebook, PatchSizes
from reca.options.fields import count
from reca.precision import fp32_products


@dataclass
class VectorCodebookSizes(PatchSizes):
    """Recipe keys of a VectorCodebook."""

    channels: int = count(16, "channels of a latent")


class VectorCodebook(PatchCodebook):
    """Encode a p x p patch as the vector of its nearest entry; decode a latent to the entry of its nearest vector.

    vectors  fp32 [entries, channels], drawn from a normal distribution, so similar vectors do not mean similar patches
    """

    vectors: Tensor

    def __init__(self, sizes: VectorCodebookSizes):
        super().__init__(sizes)
        self.register_buffer("vectors", torch.randn(sizes.entries, sizes.channels))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Encode pixels to latents, [B, channels, H / p, W / p]."""
        return self.vectors[super().encode(pixels)].transpose(1, 2).unflatten(2, (pixels.shape[2] // self.factor, -1))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # type: ignore[override]  # [B, channels, h, w]
        """Decode latents to pixels, [B, 3, h p, w p] in [-1, 1]."""
        rows = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        with fp32_products():
            codes = torch.cdist(rows, self.vectors).argmin(-1)
        height, width = latents.shape[2:]
        return super().decode(codes.view(-1, height * width), (height, width))
