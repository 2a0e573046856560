"""Harmon's modules under published names: MAR's encoder, decoder and diffusion head, and the whole network."""

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from reca.models.common.images import check_side
from reca.models.common.patch_codec import PatchCodec
from reca.models.common.planned import CAUSAL
from reca.models.common.qwen2 import Qwen2Sizes, qwen2_config
from reca.models.common.vit_blocks import Block
from reca.models.harmon import prompt
from reca.models.harmon.config import AutoencoderSizes, HarmonConfig, MarSizes
from reca.models.harmon.masking import Masking
from reca.precision import fp32_by_default
from reca_kernels import template_concat

FREQUENCIES = 256  # width of the sinusoidal timestep embedding
STEPS = 1000  # diffusion steps in training
EPS = 1e-6


def language_model(sizes: Qwen2Sizes) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(qwen2_config(sizes, tie_word_embeddings=True, attn_implementation=CAUSAL))


def projector(width_in: int, width_out: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.SiLU(), nn.Linear(hidden, width_out))


# pixels <-> latents


class Kl16(AutoencoderKL):
    """KL-16 of latent diffusion: attention in the encoder's last level and in both middle blocks."""

    @property
    def factor(self) -> int:
        """Return the number of pixels per latent in height and width."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def latents(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Encode pixels to the posterior's mean, [B, C, m, n]."""
        return self.encode(pixels).latent_dist.mode()

    def pixels(self, latents: Tensor) -> Tensor:
        return self.decode(latents).sample


class Patches(PatchCodec):
    """The codec of the toy datasets."""

    latents, pixels = PatchCodec.encode, PatchCodec.decode


def codec(config: HarmonConfig) -> Kl16 | Patches:
    c = config.autoencoder
    return kl16(c) if config.codec == "kl16" else Patches(c.patch, c.latent_channels)


def kl16(c: AutoencoderSizes) -> Kl16:
    levels = len(c.multipliers)
    return Kl16(
        down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[c.channels * m for m in c.multipliers],
        layers_per_block=c.blocks,
        latent_channels=c.latent_channels,
        norm_num_groups=32,
        scaling_factor=c.scale,
    )


def channels(config: HarmonConfig) -> int:
    """Return the number of channels of an image token."""
    return config.autoencoder.latent_channels * config.mar.patch_size**2


def check_sizes(config: HarmonConfig, factor: int) -> None:
    """Raise ValueError for image sizes that are not multiples of `factor`, the side of a token in pixels."""
    for key in ("image_size", "understanding_size"):
        size = getattr(config, key)
        if size is not None:
            check_side(f"model.{key}", size, factor)


# encoder and decoder


def _blocks(c: MarSizes, depth: int, width: int, heads: int) -> nn.ModuleList:
    if width % heads:
        raise ValueError(f"model.mar: a width of {width} is not a multiple of the number of heads, {heads}")
    return nn.ModuleList(Block(width, heads, int(width * c.mlp_ratio), EPS, c.dropout) for _ in range(depth))


class Mar(nn.Module):
    """Masked autoregressive encoder and decoder of latents, with buffer tokens first (Li et al., arXiv 2406.11838)."""

    def __init__(self, c: MarSizes, channels: int):  # channels of a token
        super().__init__()
        self.c = c
        table = lambda rows, width: nn.Parameter(torch.randn(1, rows, width) * 0.02)  # noqa: E731
        grid, wide = c.base_grid**2, c.decoder_width or c.width
        self.fake_latent = nn.Parameter(torch.randn(1, c.width) * 0.02)
        self.mask_token = table(1, wide)
        self.encoder_pos_embed_learned = table(c.buffers + grid, c.width)
        self.decoder_pos_embed_learned = table(c.buffers + grid, wide)
        self.diffusion_pos_embed_learned = table(grid, wide)
        # Published files have this unused table. It is a buffer, so that the optimizer has no state for it.
        self.class_emb = nn.Module()
        self.class_emb.register_buffer("weight", torch.randn(c.classes, c.width) * 0.02)
        self.z_proj, self.z_proj_ln = nn.Linear(channels, c.width), nn.LayerNorm(c.width, EPS)
        self.encoder_blocks = _blocks(c, c.encoder_depth, c.width, c.heads)
        self.encoder_norm = nn.LayerNorm(c.width, EPS)
        self.decoder_embed = nn.Linear(c.width, wide)
        self.decoder_blocks = _blocks(c, c.decoder_depth, wide, c.decoder_heads or c.heads)
        self.decoder_norm = nn.LayerNorm(wide, EPS)
        self.diffloss = DiffusionLoss(DiffusionHead(channels, wide, c.head_width, c.head_depth))

    def positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return a position table for a grid of m x n tokens, [1, buffers + m n, D], resized bilinearly if needed."""
        base = self.c.base_grid
        if grid == (base, base):
            return table
        buffers, squares = table.split((table.shape[1] - base * base, base * base), dim=1)
        squares = squares.unflatten(1, (base, base)).permute(0, 3, 1, 2)
        squares = F.interpolate(squares, grid, mode="bilinear", align_corners=False)
        return torch.cat((buffers, squares.flatten(2).transpose(1, 2)), dim=1)

    def encode(
        self,
        latents: Tensor,  # [B, m, n, C]
        visible: Tensor | None = None,  # int64 [B, V], raster order
        real: Tensor | None = None,  # bool [B, V], False where `visible` is padding
    ) -> Tensor:  # [B, buffers + V, D]
        """Encode the visible tokens (None: all), buffers first. Masked tokens are dropped before the first layer."""
        batch, grid, buffers = len(latents), (latents.shape[1], latents.shape[2]), self.c.buffers
        tokens, table = latents.flatten(1, 2), self.positions(self.encoder_pos_embed_learned, grid)
        front, rest = table.split((buffers, table.shape[1] - buffers), dim=1)
        if visible is None:
            x = self.z_proj(tokens) + rest
        else:
            x = self.z_proj(tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))) + rest[0][visible]
        x = torch.cat(((self.fake_latent + front).expand(batch, -1, -1), x), dim=1)
        x, seen = self.z_proj_ln(x), None
        if real is not None:
            seen = torch.cat((real.new_ones(batch, buffers), real), dim=1)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x, seen)
        return self.encoder_norm(x)

    def decode(
        self,
        encoded: Tensor,  # [B, buffers + V, D]
        visible: Tensor,  # int64 [B, V]
        real: Tensor | None,  # bool [B, V]
        grid: tuple[int, int],
    ) -> Tensor:  # [B, m n, D]
        """Decode the diffusion head's condition for every token of the grid."""
        buffers, size = self.c.buffers, grid[0] * grid[1]
        x = self.decoder_embed(encoded)
        # Padding is written to an extra last row, which is dropped.
        where = visible if real is None else torch.where(real, visible, size)
        where = torch.cat((torch.arange(buffers, device=x.device).expand(len(x), -1), where + buffers), dim=1)
        canvas = self.mask_token.to(x.dtype).expand(len(x), buffers + size + 1, -1)
        x = canvas.scatter(1, where[..., None].expand(-1, -1, x.shape[2]), x)[:, :-1]
        x = x + self.positions(self.decoder_pos_embed_learned, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, buffers:] + self.positions(self.diffusion_pos_embed_learned, grid)


# diffusion head


class DiffusionLoss(nn.Module):
    """A container that gives the diffusion head its published name."""

    def __init__(self, net: "DiffusionHead"):
        super().__init__()
        self.net = net


class DiffusionHead(nn.Module):
    """An MLP with adaptive LayerNorm that predicts a token's noise and variance range at step t from its condition."""

    def __init__(self, channels: int, condition: int, width: int, depth: int):
        super().__init__()
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embed = nn.ModuleDict({"mlp": mlp})
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.final_layer = HeadEnd(width, 2 * channels)

    def forward(
        self,
        x_t: Tensor,  # [R N, C]
        t: Tensor,  # int64 [R N]
        condition: Tensor,  # [N, D]
    ) -> Tensor:  # [R N, 2 C]
        """Predict noise and variance range.

        Row r N + i is conditioned on condition[i], which is projected once and then broadcast.
        """
        c = self.cond_embed(condition)
        return self.denoise(x_t, (self.time(t).unflatten(0, (-1, len(c))) + c).flatten(0, 1))

    def time(self, t: Tensor) -> Tensor:  # int64 [M]
        """Embed timesteps, [M, w]; if there are more rows than timesteps, through a table of all timesteps."""
        if len(t) > STEPS:
            return F.embedding(t, self.time(torch.arange(STEPS, device=t.device)))
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t.float()[:, None] * rates
        return self.time_embed["mlp"](torch.cat((angles.cos(), angles.sin()), dim=1))

    def denoise(self, x_t: Tensor, y: Tensor) -> Tensor:  # [M, C], [M, w]
        """Predict noise and variance range, [M, 2 C]. y: sum of the timestep's and the condition's embedding."""
        x, y = self.input_proj(x_t), F.silu(y)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class HeadBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = _modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # y: after SiLU, which all blocks share
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class HeadEnd(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.linear = _zero(nn.Linear(width, out))
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


def _modulation(width: int, parts: int) -> nn.Sequential:
    """Build the modulation layer. Identity replaces the published SiLU, so that parameter names agree."""
    return nn.Sequential(nn.Identity(), _zero(nn.Linear(width, parts * width)))


def _zero(layer: nn.Linear) -> nn.Linear:
    """Zero a layer's parameters: a random head starts with identity blocks and an output of 0, as in MAR."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Network(nn.Module):
    """Harmon's modules under their published names; `codec` has diffusers' names."""

    @fp32_by_default()
    def __init__(self, config: HarmonConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        width, mar = config.language.hidden_size, config.mar.width
        self.llm = language_model(config.language)
        self.mar = Mar(config.mar, channels(config))
        self.proj_in = projector(mar, width, width)
        self.proj_out = projector(width, mar, width)
        self.codec = codec(config)
        check_sizes(config, self.factor)

    @property
    def device(self) -> torch.device:
        return self.mar.mask_token.device

    @property
    def factor(self) -> int:
        """Return the side of a token in pixels."""
        return self.config.mar.patch_size * self.codec.factor

    def latents(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Encode pixels to the scaled latents of tokens, channels last, fp32 [B, m, n, C]."""
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            tokens = F.pixel_unshuffle(self.codec.latents(pixels.float()), self.config.mar.patch_size)
            return tokens.movedim(1, -1).contiguous() * self.config.autoencoder.scale

    def pixels(self, latents: Tensor) -> Tensor:  # [B, m, n, C]
        """Decode scaled latents to pixels, fp32 [B, 3, H, W] in about [-1, 1]."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            tokens = latents.float().movedim(-1, 1) / self.config.autoencoder.scale
            return self.codec.pixels(F.pixel_shuffle(tokens, self.config.mar.patch_size))

    def embed(self, layout: prompt.Layout, visual: Tensor) -> Tensor:  # [B, n, H]
        """Compute input embeddings, [B, L, H]."""
        return template_concat(self.llm.model.embed_tokens.weight, visual, layout.src)

    def states(self, layout: prompt.Layout, visual: Tensor) -> Tensor:  # [B, n, H]
        """Compute the last hidden states, [B, L, H]. Right padding with causal attention needs no mask."""
        return self.llm.model(inputs_embeds=self.embed(layout, visual), use_cache=False).last_hidden_state

    def encode_understanding(self, encoded: Tensor) -> Tensor:  # [B, buffers + S, D]
        """Project an encoded, fully visible image to h_v, [B, buffers + S, H], buffers first."""
        return self._scale_gradient(self.proj_in(encoded), encoded.shape[1])

    def condition(
        self,
        layout: prompt.Layout,
        encoded: Tensor,  # [B, buffers + V, D], the encoder's output for the visible tokens
        masking: Masking,
        grid: tuple[int, int],
        h_v: Tensor | None = None,  # [B, buffers + S', D], the encoder's output for h_v's image
    ) -> Tensor:  # [B, m n, D]
        """Compute the diffusion head's condition for every token of the target image."""
        if h_v is None:
            visual = self.proj_in(encoded)
        else:
            visual = self._scale_gradient(self.proj_in(torch.cat((h_v, encoded), dim=1)), h_v.shape[1])
        hidden = self.states(layout, visual)
        tail = layout.rows[:, -encoded.shape[1] :]
        answered = hidden.flatten(0, 1).index_select(0, tail.flatten()).unflatten(0, tail.shape)
        return self.mar.decode(encoded + self.proj_out(answered), masking.visible, masking.real, grid)

    def _scale_gradient(self, visual: Tensor, tokens: int) -> Tensor:
        """Return `visual` unchanged; scale the gradient of its first `tokens` tokens by hv_grad_scale."""
        scale = self.config.hv_grad_scale
        if visual.requires_grad and scale != 1:
            visual.register_hook(lambda grad: torch.cat((grad[:, :tokens] * scale, grad[:, tokens:]), dim=1))
        return visual
