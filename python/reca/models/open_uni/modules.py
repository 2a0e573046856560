"""OpenUni's modules, built from library classes at the configured sizes, and the whole network."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from reca.models.common.efficientnet import EfficientNetLite0
from reca.models.common.images import check_side, per_channel
from reca.models.common.patch_codebook import PatchCodebook
from reca.models.common.patch_codec import PatchCodec, PatchSizes
from reca.models.common.planned import PLANNED, CachedPrompts
from reca.models.common.pooled_features import PooledProjector, pooled
from reca.models.common.qwen2 import qwen2_config
from reca.models.common.siglip import siglip_encoder
from reca.models.common.text import control
from reca.models.common.trained import any_trained
from reca.models.open_uni.config import AutoencoderSizes, OpenUniConfig, VectorCodebookSizes
from reca.models.open_uni.prompt import CONTEXT, Layout
from reca.precision import fp32_by_default, fp32_products
from reca_kernels import template_concat

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_TOKEN_SHUFFLE = 2  # pixel shuffle: 2 x 2 patches become one token of h_v


def mllm(config: OpenUniConfig, image_token_id: int) -> InternVLForConditionalGeneration:
    """Build InternVL3: InternViT, pixel shuffle, projector and Qwen2; or EfficientNet, its projector and Qwen2."""
    vision, pools = config.vision, config.understanding == "efficientnet"
    made = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=vision.hidden_size,
                num_hidden_layers=0 if pools else vision.num_hidden_layers,
                num_attention_heads=vision.num_attention_heads,
                intermediate_size=vision.intermediate_size,
                patch_size=vision.patch_size,
                layer_norm_eps=vision.layer_norm_eps,
                image_size=vision.image_size,
                attention_bias=True,
                use_qk_norm=False,
                use_mean_pooling=True,  # no final norm
            ),
            text_config=qwen2_config(config.language, tie_word_embeddings=False),
            attn_implementation={"text_config": PLANNED},
            image_token_id=image_token_id,
            image_seq_length=hv_tokens(config),
            downsample_ratio=1 / IMAGE_TOKEN_SHUFFLE,
            tie_word_embeddings=False,
        )
    )
    if pools:
        made.model.vision_tower = EfficientNetLite0()
        made.model.multi_modal_projector = PooledProjector(config.efficientnet, config.language.hidden_size)
    return made


def connector(config: OpenUniConfig) -> SiglipEncoder:
    """Build the connector, a bidirectional transformer on the queries' hidden states."""
    sizes = config.connector
    return siglip_encoder(sizes, width=config.language.hidden_size, layers=sizes.num_hidden_layers)


def transformer(config: OpenUniConfig) -> SanaTransformer2DModel:
    """Build SANA's diffusion transformer."""
    sana, latents = config.sana, codec_sizes(config)
    return SanaTransformer2DModel(
        in_channels=latents.channels,
        out_channels=latents.channels,
        num_layers=sana.num_layers,
        num_attention_heads=sana.num_attention_heads,
        attention_head_dim=sana.attention_head_dim,
        num_cross_attention_heads=sana.num_cross_attention_heads,
        cross_attention_head_dim=sana.cross_attention_head_dim,
        cross_attention_dim=sana.num_cross_attention_heads * sana.cross_attention_head_dim,
        caption_channels=sana.caption_channels,
        mlp_ratio=sana.mlp_ratio,
        qk_norm=sana.qk_norm,
        sample_size=config.image_size // latents.size,
        patch_size=1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=sana.interpolation_scale,
    )


def dc_ae(sizes: AutoencoderSizes) -> AutoencoderDC:
    """Build DC-AE, a deterministic autoencoder."""
    multiscales = tuple((5,) if kind == "EfficientViTBlock" else () for kind in sizes.block_types)
    return AutoencoderDC(
        latent_channels=sizes.latent_channels,
        attention_head_dim=sizes.attention_head_dim,
        encoder_block_types=tuple(sizes.block_types),
        decoder_block_types=tuple(sizes.block_types),
        encoder_block_out_channels=tuple(sizes.block_out_channels),
        decoder_block_out_channels=tuple(sizes.block_out_channels),
        encoder_layers_per_block=tuple(sizes.encoder_layers),
        decoder_layers_per_block=tuple(sizes.decoder_layers),
        encoder_qkv_multiscales=multiscales,
        decoder_qkv_multiscales=multiscales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=sizes.scaling_factor,
    )


class VectorCodebook(PatchCodebook):
    """A codebook of pixel patches with a vector per entry: the codec of the emoji dataset.

    A patch is encoded as the vector of its nearest entry. A latent is decoded to the entry of its nearest vector.

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


# model.codec -> builder of the image autoencoder from its sizes, and the recipe section of these sizes. All sizes have
# `size`, pixels per latent in height and width, and `channels` per latent, because SANA is built before the codec.
CODECS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dc_ae": (dc_ae, "autoencoder"),
    "patches": (lambda sizes: PatchCodec(sizes.size, sizes.channels), "patches"),
    "codebook": (VectorCodebook, "codebook"),
}


def codec(config: OpenUniConfig) -> AutoencoderDC | PatchCodec | VectorCodebook:
    """Build the image autoencoder of `config.codec`."""
    build, _ = CODECS[config.codec]
    return build(codec_sizes(config))


def codec_sizes(config: OpenUniConfig) -> AutoencoderSizes | PatchSizes | VectorCodebookSizes:
    return getattr(config, CODECS[config.codec][1])


def check_sizes(config: OpenUniConfig) -> None:
    """Raise ValueError for image sizes that are not whole latents or whole tokens of h_v."""
    check_side("model.image_size", config.image_size, codec_sizes(config).size)
    if config.understanding == "internvit":
        check_side(
            "model.understanding_size", config.understanding_size, config.vision.patch_size * IMAGE_TOKEN_SHUFFLE
        )


def hv_tokens(config: OpenUniConfig) -> int:
    """Return the number of tokens of h_v."""
    if config.understanding == "efficientnet":
        return config.efficientnet.tokens
    side = config.understanding_size // config.vision.patch_size
    return (side // IMAGE_TOKEN_SHUFFLE) ** 2


def understanding_size(config: OpenUniConfig) -> int:
    """Return the size in pixels of the vision tower's input image."""
    return config.understanding_size if config.understanding == "internvit" else config.efficientnet.image_size


class Network(nn.Module):
    """OpenUni: a frozen InternVL3 reads prompt and queries; connector and projector map queries to SANA's condition.

    Parameters that RECA trains have their published names.
    """

    @fp32_by_default()
    def __init__(self, config: OpenUniConfig, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        check_sizes(config)
        self.config, self.tokenizer = config, tokenizer
        self.mllm = mllm(config, control(tokenizer, CONTEXT))
        self.connector = connector(config)
        self.projector = nn.Linear(config.language.hidden_size, config.sana.caption_channels)
        self.meta_queries = nn.Parameter(torch.randn(config.queries, config.language.hidden_size) * 0.02)
        self.transformer = transformer(config)
        self.codec = codec(config)

    @property
    def device(self) -> torch.device:
        return self.meta_queries.device

    @torch.no_grad()
    def encode_understanding(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        """Compute h_v of images with the vision tower, [B, n, H]."""
        if self.config.understanding == "efficientnet":
            parts = self.mllm.model
            return parts.multi_modal_projector(pooled(parts.vision_tower, pixels, self.config.efficientnet))
        return self.mllm.model.get_image_features(
            self.vit_pixels(pixels), vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output

    def vit_pixels(self, pixels: Tensor) -> Tensor:
        """Normalise pixels, then resize them, in the order of the release."""
        mean, std = (per_channel(v, pixels) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return F.interpolate(
            ((pixels + 1) / 2 - mean) / std, size=[self.config.understanding_size] * 2, mode="bilinear"
        )

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:  # [B, 3, S, S] in [-1, 1]
        """Encode images to latents, [B, C, h, w]."""
        with torch.autocast(pixels.device.type, enabled=False):
            if isinstance(self.codec, AutoencoderDC):
                return self.codec.encode(pixels.float()).latent * self.codec.config.scaling_factor
            return self.codec.encode(pixels.float())

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:  # [B, C, h, w]
        """Decode latents to pixels, fp32 [B, 3, H, W] in about [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            if isinstance(self.codec, AutoencoderDC):
                return self.codec.decode(latents.float() / self.codec.config.scaling_factor, return_dict=False)[0]
            return self.codec.decode(latents.float())

    def condition(self, layout: Layout, h_v: Tensor | None) -> Tensor:
        """Compute SANA's condition, [B, queries, caption_channels].

        The queries come last under a causal mask, so no prompt token depends on a parameter that RECA trains: the
        prompt runs once without a gradient to fill the KV cache, and only the queries have one. This is exact.
        """
        at, behind = layout.positions.tensor_split([layout.src.shape[1]], dim=1)
        with torch.set_grad_enabled(self.prompt_requires_grad()):
            embeddings = self.embed(layout.src, h_v)
            prompts = CachedPrompts(self.mllm.model.language_model, embeddings, at, layout.spans())
        rows, cast = self.meta_queries.expand(len(layout.src), -1, -1), torch.is_autocast_enabled(self.device.type)
        hidden = prompts(rows if cast else rows.to(self.text_dtype()), positions=behind)
        hidden = hidden if cast else hidden.to(rows.dtype)
        return self.projector(self.connector(inputs_embeds=hidden).last_hidden_state)

    def text_dtype(self) -> torch.dtype:
        """Return the dtype of InternVL3, which is that of its files."""
        return self.mllm.get_input_embeddings().weight.dtype

    def inference_autocast(self) -> contextlib.AbstractContextManager:
        """Autocast to InternVL3's dtype if it differs from that of the trained parts, as in bf16 training.

        Answers run InternVL3 alone, in its own dtype, and need no autocast.
        """
        mixed = self.text_dtype() != self.meta_queries.dtype
        return torch.autocast(self.device.type, self.text_dtype()) if mixed else contextlib.nullcontext()

    def embed(self, src: Tensor, h_v: Tensor | None) -> Tensor:
        """Compute the prompts' input embeddings from token ids and h_v, [B, L, H]."""
        table = self.mllm.get_input_embeddings().weight
        visual = table.new_empty(0, table.shape[1]) if h_v is None else h_v.to(table.dtype).flatten(0, -2)
        with torch.set_grad_enabled(self.prompt_requires_grad()):
            return template_concat(table, visual, src)

    def prompt_requires_grad(self) -> bool:
        """Tell whether prompts need a gradient: only if the language model, frozen in RECA, is trained."""
        return torch.is_grad_enabled() and any_trained(self.mllm.model.language_model)
