"""The parts of OpenUni, all of them library classes at the configured sizes."""

from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from reca.models.common.images import check_side
from reca.models.common.patch_codec import PatchCodec
from reca.models.common.planned import PLANNED
from reca.models.common.qwen2 import qwen2_config
from reca.models.common.siglip import siglip_encoder
from reca.models.open_uni.config import OpenUniConfig

IMAGE_TOKEN_SHUFFLE = 2  # pixel shuffle: 2 x 2 patches become one h_v token


def mllm(config: OpenUniConfig, image_token_id: int) -> InternVLForConditionalGeneration:
    """InternVL3: InternViT, pixel shuffle and projector, Qwen2."""
    vision = config.vision
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=vision.hidden_size,
                num_hidden_layers=vision.num_hidden_layers,
                num_attention_heads=vision.num_attention_heads,
                intermediate_size=vision.intermediate_size,
                patch_size=vision.patch_size,
                layer_norm_eps=vision.layer_norm_eps,
                image_size=config.understanding_size,
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


def connector(config: OpenUniConfig) -> SiglipEncoder:
    """Bidirectional transformer over the query states."""
    sizes = config.connector
    return siglip_encoder(sizes, width=config.language.hidden_size, layers=sizes.num_hidden_layers)


def transformer(config: OpenUniConfig) -> SanaTransformer2DModel:
    """SANA's diffusion transformer."""
    sana, channels = config.sana, latent_channels(config)
    return SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_layers=sana.num_layers,
        num_attention_heads=sana.num_attention_heads,
        attention_head_dim=sana.attention_head_dim,
        num_cross_attention_heads=sana.num_cross_attention_heads,
        cross_attention_head_dim=sana.cross_attention_head_dim,
        cross_attention_dim=sana.num_cross_attention_heads * sana.cross_attention_head_dim,
        caption_channels=sana.caption_channels,
        mlp_ratio=sana.mlp_ratio,
        qk_norm=sana.qk_norm,
        sample_size=config.image_size // factor(config),
        patch_size=1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale=sana.interpolation_scale,
    )


def codec(config: OpenUniConfig) -> AutoencoderDC | PatchCodec:
    return autoencoder(config) if config.codec == "dc_ae" else PatchCodec(config.patches.size, config.patches.channels)


def autoencoder(config: OpenUniConfig) -> AutoencoderDC:
    """DC-AE, a deterministic autoencoder."""
    sizes = config.autoencoder
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


def factor(config: OpenUniConfig) -> int:
    """Pixels on the side of one latent."""
    if config.codec == "patches":
        return config.patches.size
    return 2 ** (len(config.autoencoder.block_out_channels) - 1)


def latent_channels(config: OpenUniConfig) -> int:
    return config.autoencoder.latent_channels if config.codec == "dc_ae" else config.patches.channels


def check_sizes(config: OpenUniConfig) -> None:
    """Raise ValueError for images that are not whole latents, or not whole rows of h_v."""
    check_side("model.image_size", config.image_size, factor(config))
    check_side("model.understanding_size", config.understanding_size, config.vision.patch_size * IMAGE_TOKEN_SHUFFLE)


def hv_tokens(config: OpenUniConfig) -> int:
    """Tokens of h_v."""
    side = config.understanding_size // config.vision.patch_size
    return (side // IMAGE_TOKEN_SHUFFLE) ** 2
