"""Janus-Pro's modules under DeepSeek's names: SigLIP, the image tokenizer, and the whole network."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.data.views import View, Views
from reca.models.common import conv_blocks
from reca.models.common.conv_blocks import Downsample, ResBlock, Upsample, group_norm
from reca.models.common.images import check_side, to_unit
from reca.models.common.inference import check_template
from reca.models.common.patch_codebook import PatchCodebook, square
from reca.models.common.planned import PLANNED
from reca.models.common.text import encode
from reca.models.common.vit_blocks import Block, Mlp
from reca.models.janus import prompt
from reca.models.janus.config import JanusConfig, LlamaSizes, VisionSizes, VqSizes
from reca.models.janus.prompt import Layout, Segment, Vocabulary
from reca.precision import fp32_by_default, fp32_products
from reca_kernels import TextSegment, template_concat

USED = 65536  # length of an unused buffer in DeepSeek's files


def llama(sizes: LlamaSizes) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            num_key_value_heads=sizes.num_key_value_heads,
            intermediate_size=sizes.intermediate_size,
            rms_norm_eps=sizes.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            max_position_embeddings=sizes.max_position_embeddings,
            tie_word_embeddings=False,
            attn_implementation=PLANNED,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


# pixels -> h_v


class AttentionPool(nn.Module):
    """SigLIP's attention pooling. Published files have its weights, but Janus never runs it."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width = sizes.hidden_size
        self.latent = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, sizes.layer_norm_eps), Mlp(width, sizes.intermediate_size)


class Tower(nn.Module):
    """SigLIP up to the final LayerNorm of its patches, with timm's names."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width, patch = sizes.hidden_size, sizes.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.pos_embed = nn.Parameter(torch.randn(1, (sizes.image_size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            Block(width, sizes.num_attention_heads, sizes.intermediate_size, sizes.layer_norm_eps)
            for _ in range(sizes.num_hidden_layers)
        )
        self.norm, self.attn_pool = nn.LayerNorm(width, sizes.layer_norm_eps), AttentionPool(sizes)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1] -> [B, n, C], row-major
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionModel(nn.Module):
    """A container that gives the tower its published name."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.vision_tower = Tower(sizes)


class Aligner(nn.Module):
    """An MLP of two layers that projects to the language model's width."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CodeHead(nn.Module):
    """An MLP from hidden states to logits over the codebook."""

    def __init__(self, width: int, hidden: int, entries: int):
        super().__init__()
        self.output_mlp_projector, self.vision_head = nn.Linear(width, hidden), nn.Linear(hidden, entries)

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the last layer."""
        return F.gelu(self.output_mlp_projector(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(self.features(x))


# pixels <-> codes


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention at the lowest one, then down- or upsampling."""

    def __init__(self, width_in: int, width: int, blocks: int, attention: bool, change: str | None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width_in if i == 0 else width, width) for i in range(blocks))
        self.attn = nn.ModuleList(conv_blocks.Attention(width) for _ in range(blocks if attention else 0))
        if change == "down":
            self.downsample = Downsample(width)
        if change == "up":
            self.upsample = Upsample(width)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList((ResBlock(width, width), conv_blocks.Attention(width), ResBlock(width, width)))


class Encoder(nn.Module):
    def __init__(self, sizes: VqSizes):
        super().__init__()
        widths, last = [sizes.channels * m for m in (1, *sizes.multipliers)], len(sizes.multipliers) - 1
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(widths[i], widths[i + 1], sizes.blocks, i == last, None if i == last else "down")
            for i in range(last + 1)
        )
        self.mid = _middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, z, h, w]
        x = self.conv_in(x)
        for layer in (*self.conv_blocks, *self.mid):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, sizes: VqSizes):
        super().__init__()
        widths = [sizes.channels * m for m in reversed(sizes.multipliers)]  # lowest resolution first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], widths[i], sizes.blocks + 1, i == 0, None if i == last else "up")
            for i in range(last + 1)
        )
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # [B, z, h, w] -> [B, 3, H, W]
        x = self.conv_in(z)
        for layer in (*self.mid, *self.conv_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """A codebook in which entries and inputs are normalised to length 1 before comparison."""

    codebook_used: Tensor

    def __init__(self, sizes: VqSizes):
        super().__init__()
        self.embedding = nn.Embedding(sizes.entries, sizes.code_channels)
        self.register_buffer("codebook_used", torch.zeros(USED))

    def rows(self) -> Tensor:
        """Return the normalised entries, fp32 [entries, C]."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def codes(self, z: Tensor) -> Tensor:  # [B, C, h, w]
        """Return the codes of the nearest entries, int64 [B, h*w], row-major."""
        with fp32_products():
            return (F.normalize(z.flatten(2).transpose(1, 2), dim=-1) @ self.rows().T).argmax(-1)

    def entries(self, codes: Tensor, height: int, width: int) -> Tensor:  # [B, h*w]
        """Look up normalised entries, fp32 [B, C, h, w]."""
        return self.rows()[codes].transpose(1, 2).unflatten(2, (height, width))


class Vq(nn.Module):
    """LlamaGen's VQ-16 as published with Janus: one code per square of 2 ** (levels - 1) pixels a side.

    It runs in fp32 regardless of autocast, because bf16 would change codes.
    """

    def __init__(self, sizes: VqSizes):
        super().__init__()
        self.factor, self.entries = 2 ** (len(sizes.multipliers) - 1), sizes.entries
        self.encoder, self.decoder, self.quantize = Encoder(sizes), Decoder(sizes), Quantizer(sizes)
        self.quant_conv = nn.Conv2d(sizes.z_channels, sizes.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(sizes.code_channels, sizes.z_channels, 1)

    def z(self, pixels: Tensor) -> Tensor:
        """Compute the encoder's output before quantisation, fp32 [B, C, h, w]."""
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return self.quant_conv(self.encoder(pixels.float()))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Encode pixels to codes, int64 [B, h*w], row-major."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quantize.codes(self.z(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:  # [B, h*w]
        """Decode codes to pixels [B, 3, H, W] in about [-1, 1]. grid: (h, w); None: square."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.decoder(self.post_quant_conv(self.quantize.entries(codes, *(grid or square(codes)))))


def codec(config: JanusConfig) -> Vq | PatchCodebook:
    return Vq(config.vq) if config.codec == "vq" else PatchCodebook(config.patches)


def check_sizes(config: JanusConfig, factor: int) -> None:
    """Raise ValueError for image sizes that are not whole codes or patches. factor: pixels per code and side."""
    check_side("model.image_size", config.image_size, factor)
    check_side("model.vision.image_size", config.vision.image_size, config.vision.patch_size)


class SharedLlama(nn.Module):
    """Shared code of the Janus models: one causal Llama on text, h_v and the tokens of an image to generate."""

    config: Any
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    language_model: LlamaForCausalLM
    image_tokens: Any  # tokens of an image to generate

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def hv_tokens(self) -> int:
        return (self.config.vision.image_size // self.config.vision.patch_size) ** 2

    def views(self, task: str) -> Views:
        """Return the views of a task.

        RECA's h_v is computed from the target's crop; images of conversations are shrunk and padded as in the release.
        """
        size, blur = self.config.vision.image_size, self.config.hv_blur
        if task == "i2t":
            return Views(gen=None, und=View(size, fit="letterbox", min_size=self.config.vision.min_side))
        gen = View(self.config.image_size, fit="center_crop")
        same = task == "t2i" or (size == gen.size and blur == 1)
        return Views(gen=gen, und=None if same else View(size, fit="center_crop", blur=blur))

    # text -> prompts

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text, without control tokens."""
        return encode(self.tokenizer, text)

    @property
    def longest_prompt(self) -> int:
        """Return the maximum tokens of the prompt of an image to generate: boi and all codes but the last follow it."""
        return self.config.max_length - self.image_tokens

    def caption(self, text: str) -> list[Segment]:
        """Build the prompt of a caption, truncated."""
        return [TextSegment(prompt.caption(self.tokens, text, self.vocabulary, self.longest_prompt))]

    def template(self, text: str) -> list[Segment]:
        """Build RECA's prompt, an image and a template. Raises ValueError for a template that is too long."""
        system = self.config.reca_system_prompt
        whole, cut = (self.with_image(text, system, most) for most in (None, self.longest_prompt))
        check_template(text, prompt.text_length(whole), prompt.text_length(cut))
        return whole

    def check_templates(self, templates: Sequence[str]) -> None:
        for text in templates:
            self.template(text)

    def with_image(self, text: str, system: str, most: int | None = None) -> list[Segment]:
        """Build the prompt of an image and a text, up to the start of the reply. most: as in `prompt.with_image`."""
        return prompt.with_image(self.tokens, text, self.vocabulary, self.hv_tokens, system, most)

    def conversation(self, turns: Sequence[Turn]) -> list[Segment]:
        """Build a conversation about an image, truncated."""
        config = self.config
        return prompt.conversation(
            self.tokens, turns, self.vocabulary, self.hv_tokens, config.system_prompt, config.max_length
        )

    # pixels -> features

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Any]:
        features = {} if batch.gen is None else self.encode_target(to_unit(batch.gen))
        if batch.task != "t2i":
            given = batch.gen if batch.und is None else batch.und
            assert given is not None
            features["h_v"] = self.encode_understanding(to_unit(given))
        return features

    def encode_target(self, pixels: Tensor) -> dict[str, Any]:  # [B, 3, S, S] in [-1, 1]
        """Encode images to generate with the codec."""
        raise NotImplementedError

    def encode_understanding(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        """Compute h_v with SigLIP and aligner, [B, n, H]."""
        raise NotImplementedError

    def understood(self, h_v: Tensor) -> Tensor:  # [B, n, H]
        """Return the input embeddings of an image in the prompt."""
        return h_v

    def embed(self, src: Tensor, h_v: Tensor | None = None, *image: Tensor) -> Tensor:  # int32 [B, L]
        """Compute input embeddings, [B, L, H]. image: further visual embeddings after h_v, in order, each [B, n, H]."""
        table = self.language_model.model.embed_tokens.weight
        parts = [part.to(table.dtype) for part in (*([] if h_v is None else [self.understood(h_v)]), *image)]
        rows = torch.cat(parts, dim=1).flatten(0, 1) if parts else table.new_empty(0, table.shape[1])
        return template_concat(table, rows, src)

    def hidden(self, layout: Layout, h_v: Tensor | None = None, *image: Tensor) -> Tensor:
        """Compute the last hidden states, [B, L, H]."""
        return self.language_model.model(
            inputs_embeds=self.embed(layout.src, h_v, *image),
            position_ids=layout.position_ids,
            plan=layout.plan(),
            use_cache=False,
        ).last_hidden_state


class Network(SharedLlama):
    """Janus-Pro's modules under DeepSeek's names."""

    @fp32_by_default()
    def __init__(self, config: JanusConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer, width = config, tokenizer, config.language.hidden_size
        self.vocabulary = Vocabulary.of(tokenizer)
        self.vision_model = VisionModel(config.vision)
        self.aligner = Aligner(config.vision.hidden_size, width)
        self.gen_vision_model = codec(config)
        check_sizes(config, self.gen_vision_model.factor)
        entries, channels = self.gen_vision_model.entries, config.vq.code_channels
        self.gen_embed = nn.Embedding(entries, channels)
        self.gen_aligner = Aligner(channels, width)
        self.gen_head = CodeHead(width, config.head_width or width, entries)
        self.language_model = llama(config.language)

    @property
    def image_tokens(self) -> int:
        """Return the number of codes of an image, N."""
        return (self.config.image_size // self.gen_vision_model.factor) ** 2

    @torch.no_grad()
    def encode_understanding(self, pixels: Tensor) -> Tensor:
        return self.aligner(self.vision_model.vision_tower(pixels))

    def encode_target(self, pixels: Tensor) -> dict[str, Any]:
        return {"codes": self.gen_vision_model.encode(pixels)}

    def embed_codes(self, codes: Tensor) -> Tensor:  # int64 [B, n]
        """Embed codes for the language model, [B, n, H]. The table is separate from the image tokenizer's codebook."""
        return self.gen_aligner(self.gen_embed(codes))
