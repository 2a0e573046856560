"""Show-o's modules: image tokenizers, configurations of library classes, and the whole network.

A codec has `factor`, pixels per code in height and width; `entries`, the size of its codebook; `encode(pixels) ->
codes`; and `decode(codes) -> pixels`. Codes are row-major.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiConfig, PhiForCausalLM, PreTrainedTokenizerBase
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from reca.models.common.conv_blocks import Attention, Downsample, ResBlock, Upsample, group_norm
from reca.models.common.efficientnet import EfficientNetLite0
from reca.models.common.images import check_side
from reca.models.common.on_cpu import on_cpu
from reca.models.common.patch_codebook import PatchCodebook, square
from reca.models.common.planned import PLANNED, CachedPrompts
from reca.models.common.pooled_features import PooledProjector, projector
from reca.models.common.text import encode
from reca.models.show_o.config import ClipSizes, MagvitSizes, PhiSizes, ShowOConfig
from reca.models.show_o.prompt import Layout, Vocabulary, image_rows, put_image
from reca.precision import fp32_by_default
from reca_kernels import template_concat


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(width, width), Attention(width), ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, followed by down- or upsampling."""

    def __init__(self, width_in: int, width: int, blocks: int, change: str | None = None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(width_in if i == 0 else width, width) for i in range(blocks))
        if change == "down":
            self.downsample = Downsample(width)
        if change == "up":
            self.upsample = Upsample(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, sizes: MagvitSizes):
        super().__init__()
        widths = [sizes.channels * m for m in (1, *sizes.encoder_multipliers)]
        last = len(sizes.encoder_multipliers) - 1
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], blocks, "down" if i < last else None)
            for i, blocks in enumerate(sizes.encoder_blocks)
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(sizes.z_channels, sizes.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, z, h, w]
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self, sizes: MagvitSizes):
        super().__init__()
        widths = [sizes.channels * m for m in sizes.decoder_multipliers]
        self.post_quant_conv = nn.Conv2d(sizes.z_channels, sizes.z_channels, 1)
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # level 0 is the full resolution and runs last
            Level(widths[min(i + 1, len(widths) - 1)], width, blocks, "up" if i > 0 else None)
            for i, (width, blocks) in enumerate(zip(widths, sizes.decoder_blocks, strict=True))
        )
        self.norm_out, self.conv_out = group_norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # [B, z, h, w] -> [B, 3, H, W]
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """Lookup-free quantisation: each bit of a code is the sign of a channel; channel 0 is the most significant bit."""

    power_vals: Tensor
    embedding: Tensor

    def __init__(self, bits: int):
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        codes = torch.arange(2**bits)
        self.register_buffer("power_vals", powers)
        self.register_buffer("embedding", ((codes[:, None] & powers) != 0).float() * 2 - 1)

    def codes(self, z: Tensor) -> Tensor:  # [B, bits, h, w]
        """Return codes, int64 [B, h*w]; a channel of exactly 0 counts as -1."""
        return ((z > 0).flatten(2).transpose(1, 2) * self.power_vals).sum(-1)

    def entries(self, codes: Tensor, height: int, width: int) -> Tensor:  # [B, h*w]
        """Look up codebook entries of -1 and +1, fp32 [B, bits, h, w]."""
        return self.embedding[codes].transpose(1, 2).unflatten(2, (height, width))


class Magvit(nn.Module):
    """MAGVITv2 as published with Show-o: one code per square of 2 ** (levels - 1) pixels a side.

    It runs in fp32 regardless of autocast, because codes depend on signs.
    """

    def __init__(self, sizes: MagvitSizes):
        super().__init__()
        self.factor = 2 ** (len(sizes.encoder_multipliers) - 1)
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.quantize = Quantizer(sizes.z_channels)

    @property
    def entries(self) -> int:
        return len(self.quantize.embedding)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Encode pixels to codes, int64 [B, h*w], row-major."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quantize.codes(self.encoder(pixels.float()))

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:  # [B, h*w]
        """Decode codes to pixels [B, 3, H, W] in about [-1, 1]. grid: (h, w); None: square."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.decoder(self.quantize.entries(codes, *(grid or square(codes))))


# activations that transformers computes in several kernels -> name of the same function as a single torch kernel
ONE_KERNEL = {"gelu_new": "gelu_pytorch_tanh"}


def codec(config: ShowOConfig) -> Magvit | PatchCodebook:
    return Magvit(config.magvit) if config.codec == "magvitv2" else PatchCodebook(config.patches)


def phi_config(sizes: PhiSizes, vocab_size: int) -> PhiConfig:
    """Return the configuration of Phi-1.5 with LayerNorm on queries and keys, as in Show-o."""
    return PhiConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        hidden_act=ONE_KERNEL.get(sizes.hidden_act, sizes.hidden_act),
        layer_norm_eps=sizes.layer_norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": sizes.rope_theta,
            "partial_rotary_factor": sizes.partial_rotary_factor,
        },
        max_position_embeddings=sizes.max_position_embeddings,
        qk_layernorm=True,
        tie_word_embeddings=False,
        attn_implementation=PLANNED,
        bos_token_id=None,
        eos_token_id=None,
    )


def clip_tower(sizes: ClipSizes) -> CLIPVisionModel:
    """Build CLIP's vision tower without its last layer: h_v is that layer's input."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers - 1,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            hidden_act=ONE_KERNEL.get(sizes.hidden_act, sizes.hidden_act),
            layer_norm_eps=sizes.layer_norm_eps,
        )
    )
    tower.post_layernorm = nn.Identity()  # norms the pooled output, which Show-o does not use
    return tower


def check_sizes(config: ShowOConfig, factor: int) -> None:
    """Raise ValueError for image sizes that are not whole codes or patches, or for two vision towers.

    factor: pixels per code in height and width.
    """
    sides: dict[str, tuple[float, int]] = {"model.image_size": (config.image_size, factor)}
    given = config.hv_source or config.understanding
    if given == "vq":
        step = 1 if config.hv_resize_back else factor
        sides["model.image_size / model.hv_down_scale"] = (config.image_size / config.hv_down_scale, step)
    read = {given, config.understanding}
    if {"clip", "efficientnet"} <= read:
        raise ValueError(
            "model.understanding and model.hv_source name clip and efficientnet, but Show-o has one projector, for one "
            "of them; set both to the same, or one of them to vq"
        )
    if "clip" in read:
        sides["model.clip.image_size"] = (config.clip.image_size, config.clip.patch_size)
    for name, (side, divisor) in sides.items():
        check_side(name, side, divisor)


class LastLayer(PhiDecoderLayer):
    """The last layer. No later layer attends to its output, so its MLP can run on only the rows that are read."""

    def forward(self, hidden_states: Tensor, *args: Any, read: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Compute all rows, [B, L, H], or only those with indices `read` among all B * L, int64 [n], as [1, n, H]."""
        if read is None:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, *args, **kwargs)
        attended, normed, before = (
            x.flatten(0, 1).index_select(0, read)[None] for x in (attended, normed, hidden_states)
        )
        return self.resid_dropout(attended) + self.resid_dropout(self.mlp(normed)) + before


class Network(nn.Module):
    """Show-o's modules. `showo` and `mm_projector` have their published names; all others are frozen."""

    @fp32_by_default()
    def __init__(self, config: ShowOConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.codec = codec(config)
        self.vocabulary = Vocabulary.of(tokenizer, self.codec.entries)
        check_sizes(config, self.codec.factor)
        self.showo = PhiForCausalLM(phi_config(config.phi, self.vocabulary.size))
        self.showo.model.layers[-1].__class__ = LastLayer
        if self.uses_clip:
            self.clip = clip_tower(config.clip)
            self.mm_projector: nn.Module = projector(config.clip.hidden_size, config.phi.hidden_size)
        if self.uses_efficientnet:
            self.efficientnet = EfficientNetLite0()
            self.mm_projector = PooledProjector(config.efficientnet, config.phi.hidden_size)

    @property
    def device(self) -> torch.device:
        return self.showo.lm_head.weight.device

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text, without control tokens."""
        return encode(self.tokenizer, text)

    @property
    def hv_source(self) -> str:
        return self.config.hv_source or self.config.understanding

    @property
    def uses_clip(self) -> bool:
        return "clip" in (self.config.understanding, self.hv_source)

    @property
    def uses_efficientnet(self) -> bool:
        return "efficientnet" in (self.config.understanding, self.hv_source)

    @property
    def image_tokens(self) -> int:
        """Return the number of codes of an image, N."""
        return (self.config.image_size // self.codec.factor) ** 2

    def visual(self, h_v: Tensor) -> Tensor:
        """Project features [B, n, C] or [B, C], or embed codes [B, n], to the language model's width: [B, n, H]."""
        if h_v.is_floating_point():
            return self.mm_projector(h_v.to(next(self.mm_projector.parameters()).dtype))
        return self.showo.model.embed_tokens(h_v + self.vocabulary.offset)

    def embed(self, src: Tensor, h_v: Tensor | None) -> Tensor:  # int32 [B, L]
        """Compute input embeddings, [B, L, H]."""
        table = self.showo.model.embed_tokens.weight
        visual = table.new_empty(0, table.shape[1]) if h_v is None else self.visual(h_v).to(table.dtype)
        return template_concat(table, visual, src)

    def hidden(
        self,
        layout: Layout,
        h_v: Tensor | None = None,
        prompt_requires_grad: bool = True,
        read: Tensor | None = None,  # bool [B, L]
        read_rows: int = 0,
    ) -> Tensor:
        """Compute the last hidden states, [B, L, H].

        On a CPU, padding is skipped, and in the last layer all rows that are not read; the result there is 0.

        prompt_requires_grad: gradients reach token embeddings and projector. read: rows that the caller reads; None:
        all. read_rows: their number.
        """
        filled, places, rows = layout, None, None  # places: indices of the computed rows among B * L; None: all
        if on_cpu(layout.src):
            places = layout.places()
            filled = layout if places is None else layout.packed(places)
            if read is not None:
                wanted = torch.nonzero_static(read.flatten(), size=read_rows)[:, 0]
                rows = wanted if places is None else torch.searchsorted(places, wanted)
                places = wanted
        with torch.set_grad_enabled(prompt_requires_grad and torch.is_grad_enabled()):
            embeddings = self.embed(filled.src, h_v)
        hidden = self.showo.model(
            inputs_embeds=embeddings,
            position_ids=filled.position_ids,
            plan=filled.plan(),
            read=rows,
            use_cache=False,
        ).last_hidden_state
        if places is None:
            return hidden
        spread = hidden.new_zeros(layout.src.numel(), hidden.shape[-1]).index_copy(0, places, hidden[0])
        return spread.view(*layout.src.shape, -1)

    def code_logits(self, prompts: CachedPrompts, image: Layout, codes: Tensor) -> Tensor:  # int64 [B, N]
        """Compute logits over the codebook at the image's positions, [B, N, entries]. Code `entries` is the mask.

        prompts, image: parts of `split_image`.
        """
        v, head = self.vocabulary, self.showo.lm_head
        rows = self.embed(put_image(image, codes + v.offset).src, None)
        hidden = prompts(rows, image.runs, image.position_ids)[:, image_rows(codes.shape[1])]
        return F.linear(hidden, head.weight[v.offset : v.mask], head.bias[v.offset : v.mask])
