"""BAGEL's parts beside the language model: SigLIP over packed images, position tables, time embedding, image codecs.

A codec has `factor`, the pixels on the side of a latent; `channels` of a latent; `encode(pixels) -> moments`;
`latents(moments, noise)` and `decode(latents) -> pixels`. Moments are mean and log-variance, [2 C, h, w] per image.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from reca.models.bagel.config import AutoencoderSizes, BagelConfig, VisionSizes
from reca.models.common.patch_codec import PatchCodec
from reca.models.common.siglip import siglip_encoder
from reca_kernels.host import on_device

TIME_WIDTH, TIME_PERIOD = 256, 10000.0
CERTAIN = -60.0  # log-variance of a latent without spread
GROUPS = 32  # of every GroupNorm in the FLUX autoencoder


class Embeddings(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.patch_embedding = nn.Linear(3 * sizes.patch_size**2, sizes.hidden_size)
        self.position_embedding = nn.Embedding(side(sizes) ** 2, sizes.hidden_size)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:  # [B, n, 3 p p], int64 [n]
        return self.patch_embedding(patches) + self.position_embedding(positions)


class VisionModel(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.sizes = sizes
        self.embeddings = Embeddings(sizes)
        layers = sizes.num_hidden_layers - 1
        self.encoder = siglip_encoder(sizes, width=sizes.hidden_size, layers=layers, eps=sizes.layer_norm_eps)
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """A row per patch, [B, H / p, W / p, C]. Every image sees itself only."""
        p = self.sizes.patch_size
        height, width = (size // p for size in pixels.shape[2:])
        positions = on_device(grid(height, width, side(self.sizes)), pixels.device)
        patches = patchify(pixels, p).to(self.embeddings.patch_embedding.weight.dtype)
        hidden = self.encoder(inputs_embeds=self.embeddings(patches, positions)).last_hidden_state
        return self.post_layernorm(hidden).unflatten(1, (height, width))


class Vision(nn.Module):
    """SigLIP under its published name."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.vision_model = VisionModel(sizes)


class Connector(nn.Module):
    """From SigLIP's width to the language model's."""

    def __init__(self, narrow: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(narrow, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # fp32 [B], in [0, 1] and not a thousand times that
        half = TIME_WIDTH // 2
        frequencies = TIME_PERIOD ** (-torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=1).to(self.mlp[0].weight.dtype))


class PositionTable(nn.Module):
    """Fixed sines and cosines of a grid's columns (first half of a row) and rows (second half).

    The published file holds this table rounded to bf16; it is computed here instead, as the release does.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.size, self.width = size, width
        self.register_buffer("pos_embed", self.table())

    def table(self) -> Tensor:  # fp32 [size size, width]
        quarter = self.width // 4
        frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        angles = torch.arange(self.size, dtype=torch.float64)[:, None] * frequencies
        axis = torch.cat((angles.sin(), angles.cos()), dim=1).float()
        columns, rows = axis.expand(self.size, -1, -1), axis[:, None].expand(-1, self.size, -1)
        return torch.cat((columns, rows), dim=2).flatten(0, 1)


class FluxCodec(nn.Module):
    """The autoencoder of FLUX.1 in fp32."""

    def __init__(self, sizes: AutoencoderSizes):
        super().__init__()
        self.sizes, self.channels = sizes, sizes.latent_channels
        levels = len(sizes.block_out_channels)
        self.factor = 2 ** (levels - 1)
        self.autoencoder = AutoencoderKL(
            block_out_channels=tuple(sizes.block_out_channels),
            layers_per_block=sizes.layers_per_block,
            latent_channels=sizes.latent_channels,
            norm_num_groups=GROUPS,
            use_quant_conv=False,
            use_post_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )

    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        with torch.autocast(pixels.device.type, enabled=False):
            return self.autoencoder.encoder(pixels.float())

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:  # [..., 2 C, h, w], [..., C, h, w]
        """A draw of the posterior, or its mean."""
        mean, log_variance = moments.float().chunk(2, dim=-3)
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return self.sizes.scaling_factor * (z - self.sizes.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:  # [B, C, h, w]
        with torch.autocast(latents.device.type, enabled=False):
            return self.autoencoder.decoder(latents.float() / self.sizes.scaling_factor + self.sizes.shift_factor)


class Patches(PatchCodec):
    """The embedded world's codec."""

    def encode(self, pixels: Tensor) -> Tensor:
        mean = super().encode(pixels.float())
        return torch.cat((mean, torch.full_like(mean, CERTAIN)), dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, log_variance = moments.float().chunk(2, dim=-3)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise


def codec(config: BagelConfig) -> nn.Module:
    if config.codec == "flux":
        return FluxCodec(config.autoencoder)
    return Patches(config.patches.size, config.patches.channels)


def side(sizes: VisionSizes) -> int:
    """Patches on the side of the largest image that SigLIP has positions for."""
    return sizes.image_size // sizes.patch_size


def grid(height: int, width: int, size: int) -> Tensor:
    """Numbers of a height x width corner of a size x size grid, row by row, int64 [height width]."""
    return (torch.arange(height)[:, None] * size + torch.arange(width)).flatten()


def patchify(image: Tensor, patch: int) -> Tensor:
    """[..., C, H, W] as rows [..., H W / (p p), p p C]: patches row by row, inside one (row, column, channel)."""
    parts = image.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [..., C, h, p, w, p]
    return parts.movedim(-5, -1).transpose(-4, -3).flatten(-5, -4).flatten(-3)


def unpatchify(rows: Tensor, height: int, width: int, patch: int) -> Tensor:  # [n, p p C]
    """The image [C, height p, width p] whose rows these are."""
    parts = rows.view(height, width, patch, patch, -1).permute(4, 0, 2, 1, 3)  # [C, h, p, w, p]
    return parts.flatten(3).flatten(1, 2)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards 1 by a shift above 1 (Esser et al. 2024, arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def by_size(images: Sequence[Tensor], encode: Callable[[Tensor], Tensor], pixels: int) -> list[Tensor]:
    """`encode` of every image [C, H, W]; images of one size go together, at most `pixels` of them in one call."""
    groups: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    made: list[Tensor] = [None] * len(images)
    for shape, members in groups.items():
        n = max(1, pixels // (shape[-2] * shape[-1]))
        for start in range(0, len(members), n):
            part = members[start : start + n]
            for i, row in zip(part, encode(torch.stack([images[i] for i in part])), strict=True):
                made[i] = row
    return made
