"""Recipe keys of OpenUni. The defaults are L-512, "2+1.6B"."""

from dataclasses import dataclass
from typing import Optional

from reca.options import option


@dataclass
class VisionSizes:
    hidden_size: int = option(1024, "width of InternViT")
    num_hidden_layers: int = option(24, "its layers")
    num_attention_heads: int = option(16, "its heads")
    intermediate_size: int = option(4096, "width of its MLP")
    patch_size: int = option(14, "pixels on the side of a patch")
    layer_norm_eps: float = option(1e-6, "its LayerNorm epsilon")


@dataclass
class LanguageSizes:
    hidden_size: int = option(1536, "width of the Qwen2 language model")
    num_hidden_layers: int = option(28, "its layers")
    num_attention_heads: int = option(12, "its query heads")
    num_key_value_heads: int = option(2, "its key and value heads")
    intermediate_size: int = option(8960, "width of its MLP")
    vocab_size: int = option(151674, "rows of its embedding table")
    rms_norm_eps: float = option(1e-6, "its RMSNorm epsilon")
    rope_theta: float = option(1e6, "base of its rotary frequencies")


@dataclass
class ConnectorSizes:
    num_hidden_layers: int = option(6, "layers of the connector, as wide as the language model")
    num_attention_heads: int = option(24, "its heads")
    intermediate_size: int = option(8960, "width of its MLP")


@dataclass
class SanaSizes:
    num_layers: int = option(20, "blocks of the diffusion transformer")
    num_attention_heads: int = option(70, "heads of its linear attention")
    attention_head_dim: int = option(32, "width of such a head")
    num_cross_attention_heads: int = option(20, "heads of its cross-attention")
    cross_attention_head_dim: int = option(112, "width of such a head")
    caption_channels: int = option(2304, "width of its text condition")
    mlp_ratio: float = option(2.5, "width of its MLP over its own width")
    qk_norm: Optional[str] = option(None, "rms_norm_across_heads for SANA-1.5")
    interpolation_scale: Optional[float] = option(
        None,
        "unit of a table of sine positions, as in SANA's 4K models; null: no table, positions come from convolutions",
    )


@dataclass
class AutoencoderSizes:
    latent_channels: int = option(32, "channels of a DC-AE latent")
    attention_head_dim: int = option(32, "width of an attention head")
    block_types: list[str] = option(
        lambda: ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, "kind of block per stage, outermost first"
    )
    block_out_channels: list[int] = option(lambda: [128, 256, 512, 512, 1024, 1024], "channels per stage")
    encoder_layers: list[int] = option(lambda: [2, 2, 2, 3, 3, 3], "blocks per encoder stage")
    decoder_layers: list[int] = option(lambda: [3] * 6, "blocks per decoder stage")
    scaling_factor: float = option(0.41407, "latents are multiplied by this")


@dataclass
class PatchSizes:
    size: int = option(4, "pixels on the side of a latent")
    channels: int = option(16, "channels of a latent")


@dataclass
class OpenUniConfig:
    weights: Optional[str] = option(
        None,
        "the .pth that OpenUni publishes (connector, projector, queries and perhaps the DiT), or the folder of an "
        "export; null: random",
    )
    overlay: Optional[str] = option(None, "a second such file put over the first, as RECA results are published")
    mllm: Optional[str] = option(None, "hub id or folder of InternVL3, original or -hf layout; null: random")
    dit: Optional[str] = option(None, "hub id or folder of SANA in diffusers layout; null: random")
    vae: Optional[str] = option(None, "hub id or folder of DC-AE in diffusers layout; null: random")
    tokenizer: Optional[str] = option(None, "hub id or folder of the tokenizer; null: mllm's, or a word list if random")
    words: list[str] = option(list, "vocabulary of the word tokenizer that a random model uses")
    vision: VisionSizes = option(VisionSizes, "")
    language: LanguageSizes = option(LanguageSizes, "")
    connector: ConnectorSizes = option(ConnectorSizes, "")
    sana: SanaSizes = option(SanaSizes, "")
    codec: str = option(
        "dc_ae", "autoencoder: dc_ae, or patches (linear; stands in for it in the embedded world)", ("dc_ae", "patches")
    )
    autoencoder: AutoencoderSizes = option(AutoencoderSizes, "dc_ae's sizes")
    patches: PatchSizes = option(PatchSizes, "patches' sizes")
    queries: int = option(256, "learnable queries behind every prompt")
    image_size: int = option(512, "pixels on the side of a generated picture", least=1)
    understanding_size: int = option(
        448, "pixels on the side of what InternViT sees; 224 is a tighter bottleneck", least=1
    )
    hv_blur: int = option(1, "RECA: shrink by this and resize back what h_v is made of (a tighter bottleneck)", least=1)
    parity: bool = option(False, "round sigma to bf16 as the release does")
    seed: int = option(0, "of a random initialisation")


def tiny() -> OpenUniConfig:
    """A random model of about 0.3 M parameters with the wiring of the real one."""
    return OpenUniConfig(
        vision=VisionSizes(32, 2, 2, 64, 14),
        language=LanguageSizes(48, 2, 4, 2, 96, 512),
        connector=ConnectorSizes(2, 3, 96),
        sana=SanaSizes(2, 4, 8, 2, 16, 32),
        autoencoder=AutoencoderSizes(8, 8, ["ResBlock", "EfficientViTBlock"], [8, 16], [1, 1], [1, 1]),
        queries=8,
        image_size=32,
        understanding_size=56,
    )
