"""Recipe keys of Janus-Pro. The defaults are the published 1B."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codebook import PatchSizes
from reca.options import HUB, config_field, count, pixels, share

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass
class LlamaSizes:
    hidden_size: int = count(2048, "width of the language model")
    num_hidden_layers: int = count(24, "its layers")
    num_attention_heads: int = count(16, "its query heads")
    num_key_value_heads: int = count(16, "its key and value heads")
    intermediate_size: int = count(5632, "width of its MLPs")
    vocab_size: int = count(102400, "size of its embedding table, which may be larger than the tokenizer's vocabulary")
    rms_norm_eps: float = config_field(1e-6, "epsilon of its RMSNorms", above=0)
    rope_theta: float = config_field(1e4, "base of its rotary frequencies", above=0)
    max_position_embeddings: int = count(16384, "positions that its config.json names")


@dataclass
class VisionSizes:
    hidden_size: int = count(1024, "width of SigLIP")
    num_hidden_layers: int = count(24, "its layers")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4096, "width of its MLPs")
    image_size: int = pixels(384, "height and width of the image it reads in pixels")
    patch_size: int = count(16, "pixels of a patch in height and width; one patch is one token of h_v")
    min_side: int = count(14, "pixels that the short side of a thin image keeps when it is shrunk")
    layer_norm_eps: float = config_field(1e-6, "its LayerNorm epsilon", above=0)


@dataclass
class VqSizes:
    channels: int = count(128, "base width of the image tokenizer; its GroupNorms have 32 groups")
    multipliers: list[int] = count(lambda: [1, 1, 2, 2, 4], "width per level, in base widths, from the image inwards")
    blocks: int = count(2, "residual blocks of an encoder level; the decoder's levels have one more")
    z_channels: int = count(256, "channels between its convolutions and the codebook")
    entries: int = count(16384, "codebook entries")
    code_channels: int = count(8, "channels of a codebook entry, and of the table that embeds codes")


@dataclass
class JanusConfig:
    weights: Optional[str] = config_field(
        None, "hub id or folder of Janus-Pro, in DeepSeek's or transformers' layout; null: random", path=HUB
    )
    tokenizer: Optional[str] = config_field(
        None, "hub id or folder of the tokenizer; null: that of weights, `words` without weights", path=HUB
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer that a random model uses")
    dtype: str = config_field(
        "fp32",
        "type that language model, code embeddings and head are kept in; the rest is fp32",
        ("fp32", "bf16"),
    )
    export_layout: str = config_field(
        "deepseek", "whose names `reca export` writes: deepseek's or transformers'", ("deepseek", "transformers")
    )
    image_size: int = pixels(384, "size in pixels of a generated image")
    max_length: int = count(4096, "most tokens of a training sequence; texts are cut to it (the report's context)")
    system_prompt: str = config_field(SYSTEM_PROMPT, "text before a conversation about an image")
    reca_system_prompt: str = config_field(
        "", "text before the image in RECA; empty as in text-to-image, which has none"
    )
    reca_drop: float = share(0.1, "share of samples that lose h_v and template in RECA, for guidance")
    caption_drop: float = share(0.1, "share of captions that text-to-image training drops, for guidance")
    hv_blur: int = count(1, "RECA: shrink by this and resize back what h_v is made of (a tighter bottleneck)")
    language: LlamaSizes = config_field(LlamaSizes, "")
    vision: VisionSizes = config_field(VisionSizes, "")
    codec: str = config_field("vq", "image tokenizer: vq, or patches (a codebook of pixel patches)", ("vq", "patches"))
    vq: VqSizes = config_field(VqSizes, "")
    patches: PatchSizes = config_field(PatchSizes, "")
    head_width: Optional[int] = count(None, "hidden width of the code head; null: the language model's")
    seed: int = config_field(0, "of a random initialisation", least=0)
