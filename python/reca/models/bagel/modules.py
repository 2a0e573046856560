"""BAGEL's modules other than the language model (SigLIP, position tables, time embedding), and the whole network."""

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.models.bagel import prompt
from reca.models.bagel.config import BagelConfig, VisionSizes
from reca.models.bagel.transformer import GEN, UND, KVCache, LanguageModel, PackedPass
from reca.models.common.images import check_side, to_unit
from reca.models.common.kl_codec import KlCodec, PatchMoments
from reca.models.common.siglip import siglip_encoder
from reca.models.common.text import encode
from reca.models.common.trained import any_trained
from reca.precision import fp32_by_default
from reca_kernels import template_concat
from reca_kernels.host import on_device

TIME_WIDTH, TIME_PERIOD = 256, 10000.0
ENCODED_AT_ONCE = 1 << 20  # maximum pixels per call of the codec or of SigLIP: one image of 1024 x 1024


class Embeddings(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.patch_embedding = nn.Linear(3 * sizes.patch_size**2, sizes.hidden_size)
        self.position_embedding = nn.Embedding(vit_size(sizes) ** 2, sizes.hidden_size)

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
        """Encode images of one size, one token per patch: [B, H / p, W / p, C]."""
        p = self.sizes.patch_size
        height, width = (size // p for size in pixels.shape[2:])
        positions = on_device(prompt.grid(height, width, vit_size(self.sizes)), pixels.device)
        patches = patchify(pixels, p).to(self.embeddings.patch_embedding.weight.dtype)
        hidden = self.encoder(inputs_embeds=self.embeddings(patches, positions)).last_hidden_state
        return self.post_layernorm(hidden).unflatten(1, (height, width))


class Vision(nn.Module):
    """A container that gives SigLIP its published name."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.vision_model = VisionModel(sizes)


class Connector(nn.Module):
    """An MLP that maps h_v from SigLIP's width to the language model's."""

    def __init__(self, narrow: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(narrow, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # fp32 [B] in [0, 1], not scaled by 1000
        half = TIME_WIDTH // 2
        frequencies = TIME_PERIOD ** (-torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=1).to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """A fixed 2D sine-cosine table: the first half of the channels encodes the column, the second half the row.

    The published file has this table rounded to bf16. It is computed here instead, as in the release.
    """

    pos_embed: Tensor

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


def codec(config: BagelConfig) -> KlCodec | PatchMoments:
    if config.codec == "flux":
        return KlCodec(config.autoencoder, shift=config.autoencoder.shift_factor, quant_convs=False)
    return PatchMoments(config.patches.size, config.patches.channels)


def vit_size(sizes: VisionSizes) -> int:
    """Return the side in patches of SigLIP's position table."""
    return sizes.image_size // sizes.patch_size


def patchify(image: Tensor, patch: int) -> Tensor:
    """Cut [..., C, H, W] into row-major patches [..., H W / (p p), p p C], flattened as (row, column, channel)."""
    parts = image.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [..., C, h, p, w, p]
    return parts.movedim(-5, -1).transpose(-4, -3).flatten(-5, -4).flatten(-3)


def unpatchify(rows: Tensor, height: int, width: int, patch: int) -> Tensor:  # [n, p p C]
    """Invert `patchify` for one image, [C, height p, width p]."""
    parts = rows.view(height, width, patch, patch, -1).permute(4, 0, 2, 1, 3)  # [C, h, p, w, p]
    return parts.flatten(3).flatten(1, 2)


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Shift noise levels, towards 1 for a shift above 1 (Esser et al., arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def by_size(images: Sequence[Tensor], encode: Callable[[Tensor], Tensor], pixels: int) -> list[Tensor]:
    """Encode images [C, H, W], batching those of one size, with at most `pixels` pixels per call (or one image)."""
    groups: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    made: dict[int, Tensor] = {}
    for shape, members in groups.items():
        n = max(1, pixels // (shape[-2] * shape[-1]))
        for start in range(0, len(members), n):
            part = members[start : start + n]
            for i, row in zip(part, encode(torch.stack([images[i] for i in part])), strict=True):
                made[i] = row
    return [made[i] for i in range(len(images))]


class Network(nn.Module):
    """BAGEL's modules. Parameters have their published names, except those of `codec`."""

    @fp32_by_default()
    def __init__(self, config: BagelConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vocabulary = prompt.Vocabulary.of(tokenizer)
        width = config.language.hidden_size
        self.codec = codec(config)
        check_side("model.image_size", config.image_size, self.token_side)
        channels = self.codec.channels * config.latent_patch_size**2
        self.language_model = LanguageModel(config.language)
        self.time_embedder = TimeEmbedder(width)
        self.vae2llm, self.llm2vae = nn.Linear(channels, width), nn.Linear(width, channels)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)
        self.vit_model = Vision(config.vision)
        self.vit_pos_embed = PositionTable(vit_size(config.vision), width)
        self.connector = Connector(config.vision.hidden_size, width)

    @property
    def device(self) -> torch.device:
        return self.vae2llm.weight.device

    @property
    def token_side(self) -> int:
        """Return the number of pixels per image token in height and width."""
        return self.codec.factor * self.config.latent_patch_size

    # pixels -> features

    def moments(self, images: Sequence[Tensor]) -> list[Tensor]:  # uint8 [3, H, W]
        """Encode images with the codec, fp32 [2 C, h, w] per image."""
        return by_size([to_unit(image) for image in images], self.codec.encode, ENCODED_AT_ONCE)

    def encode_understanding(self, images: Sequence[Tensor]) -> list[Tensor]:  # uint8 [3, H, W]
        """Encode images with SigLIP to h_v before the connector, [h, w, C] per image."""
        return by_size([to_unit(image) for image in images], self.vit_model.vision_model, ENCODED_AT_ONCE)

    # text -> ids

    def text(self, text: str) -> prompt.Text:
        """Tokenise a text."""
        return prompt.add_bos_eos(encode(self.tokenizer, text), self.vocabulary)

    def conversation(self, turns: Sequence[Sequence[str]], beside: int = 0) -> prompt.Text:
        """Tokenise a conversation, truncated to MAX_LENGTH with the `beside` other tokens of its sample."""
        ids = [(encode(self.tokenizer, asked), encode(self.tokenizer, answer)) for asked, answer in turns]
        return prompt.conversation(ids, self.vocabulary, beside)

    # sequences -> hidden states

    def layout(self, items: Sequence[Sequence[prompt.Item]], positions: Sequence[int] | None = None) -> prompt.Layout:
        """Lay out the items of each sample, on the host. positions: rotary positions of the first items; None: 0."""
        positions = [0] * len(items) if positions is None else positions
        sizes = vit_size(self.config.vision), self.config.max_latent_size
        return prompt.layout(items, self.vocabulary, positions, *sizes)

    def empty_cache(self, samples: int) -> KVCache:
        return KVCache.empty(len(self.language_model.model.layers), samples)

    def prefill(
        self, given: prompt.Prompt, cache: KVCache | None = None, layout: prompt.Layout | None = None
    ) -> tuple[Tensor, KVCache]:
        """Run a prompt that follows the cached tokens.

        layout: layout of the items, if computed already. Returns the hidden states of the understanding rows, [U, D],
        and the extended cache.
        """
        cache = self.empty_cache(len(given.items)) if cache is None else cache
        layout = self.layout(given.items, cache.positions) if layout is None else layout
        tokens = t = None
        if given.latents:
            tokens = torch.cat([patchify(z, self.config.latent_patch_size) for z in given.latents])
            t = torch.zeros(len(given.latents), dtype=torch.float32, device=self.device)
        out, cache = self._forward(layout.to(self.device), cache, given.h_v, tokens, t)
        return out[UND], cache

    def predict_velocity(
        self,
        cache: KVCache,
        layout: prompt.Layout,  # of one NoisyImage per sample, after the cached tokens
        tokens: Tensor,  # [sum of h w, channels]
        t: Tensor,  # fp32 [samples], or [1] for all samples
    ) -> Tensor:  # [sum of h w, channels]
        """Predict the velocity of one noisy image per sample."""
        out, _ = self._forward(layout.to(self.device), cache, None, tokens, t)
        return self.llm2vae(out[GEN].to(self.llm2vae.weight.dtype))

    def _forward(
        self,
        layout: prompt.Layout,
        cache: KVCache,
        h_v: Sequence[Tensor] | None,
        tokens: Tensor | None,
        t: Tensor | None,
    ) -> tuple[dict[str, Tensor], KVCache]:
        """Run one pass. Returns the hidden states per expert, and the cache after the pass."""
        learn = torch.is_grad_enabled() and self.prompt_requires_grad()
        rows, table = {}, self.language_model.model.embed_tokens.weight
        with torch.set_grad_enabled(learn):
            adds = [(self.vit_pos_embed.pos_embed, layout.vit_positions)] if h_v else []
            dtype = self.residual_dtype(table)
            rows[UND] = template_concat(table, self.connect(h_v), layout.src, adds=adds, out_dtype=dtype)
        if tokens is not None and t is not None:
            # Noise levels are few: their embeddings are added by row index, one row per image or one for all.
            level = layout.image_ids if len(t) > 1 else torch.zeros_like(layout.image_ids)
            adds = [(self.time_embedder(t), level), (self.latent_pos_embed.pos_embed, layout.latent_positions)]
            latent = self.vae2llm(tokens.to(self.vae2llm.weight.dtype))
            order = -1 - torch.arange(len(latent), device=self.device)
            dtype = self.residual_dtype(self.vae2llm.weight)
            rows[GEN] = template_concat(table.detach(), latent, order, adds=adds, out_dtype=dtype)
        model = self.language_model.model
        rotary = {expert: model.rotary(layout.positions[expert]) for expert in rows}
        out, layers = model(rows, cache.layers, PackedPass.plan(layout.splits, cache, rotary, learn))
        return out, cache.after(layers, layout.splits, layout.next_positions)

    def connect(self, h_v: Sequence[Tensor] | None) -> Tensor:
        """Project h_v to the language model's width, without position embeddings: [tokens, D]."""
        if not h_v:
            return self.language_model.model.embed_tokens.weight.new_empty(0, self.config.language.hidden_size)
        return self.connector(torch.cat([tokens.flatten(0, 1) for tokens in h_v]))

    def prompt_requires_grad(self) -> bool:
        """Tell whether understanding rows need a gradient, in the pass of the noisy image too. In RECA they do not."""
        return any_trained(self.vit_model, self.connector, self.language_model, skipped=GEN)

    @staticmethod
    def residual_dtype(weight: Tensor) -> torch.dtype:
        """Return the dtype of the residual stream: autocast's, as in the release, or else the weights'."""
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def inference_autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to bf16 if weights are mixed, as training with precision bf16 does."""
        mixed = self.config.dtype == "mixed"
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext()


def role(name: str) -> str:
    """Return the role of a parameter, or of a tensor of the published file."""
    part = name.split(".")[0]
    if part == "language_model":
        if name.startswith(("language_model.lm_head.", "language_model.model.embed_tokens.")):
            return "embed"
        return "gen_lm" if "_moe_gen" in name else "und_lm"
    return {"codec": "codec", "vit_model": "und_encoder", "connector": "bridge"}.get(part, "gen_head")
