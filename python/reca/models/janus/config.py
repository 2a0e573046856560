"""Recipe keys of Janus-Pro. The defaults are those of the published 1B model."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codebook import CodebookSizes
from reca.options.fields import HUB, config_field, count, pixels, share

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
    max_position_embeddings: int = count(16384, "number of positions in its config.json")


@dataclass
class VisionSizes:
    hidden_size: int = count(1024, "width of SigLIP")
    num_hidden_layers: int = count(24, "its layers")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4096, "width of its MLPs")
    image_size: int = pixels(384, "size in pixels of its input image")
    patch_size: int = count(16, "size in pixels of a patch, which is one token of h_v")
    min_side: int = count(14, "minimum pixels of the short side when a narrow image is shrunk")
    layer_norm_eps: float = config_field(1e-6, "its LayerNorm epsilon", above=0)


@dataclass
class VqSizes:
    channels: int = count(128, "base width of the image tokenizer; its GroupNorms have 32 groups")
    multipliers: list[int] = count(lambda: [1, 1, 2, 2, 4], "width per level, in base widths, outermost first")
    blocks: int = count(2, "residual blocks per encoder level; a decoder level has one more")
    z_channels: int = count(256, "channels between its convolutions and the codebook's projections")
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
    words: list[str] = config_field(list, "vocabulary of the word tokenizer of a random model")
    dtype: str = config_field(
        "fp32",
        "dtype of language model, code embeddings and code head; the rest is fp32",
        ("fp32", "bf16"),
    )
    export_layout: str = config_field(
        "deepseek", "format of `reca export`: deepseek's or transformers'", ("deepseek", "transformers")
    )
    image_size: int = pixels(384, "size in pixels of a generated image")
    max_length: int = count(4096, "maximum tokens of a training sequence; texts are truncated (the report's context)")
    system_prompt: str = config_field(SYSTEM_PROMPT, "text before a conversation about an image")
    reca_system_prompt: str = config_field(
        "", "text before the image in RECA; empty by default, as in text-to-image prompts"
    )
    reca_drop: float = share(0.1, "share of samples whose h_v and template are dropped in RECA, for guidance")
    caption_drop: float = share(0.1, "share of captions dropped in text-to-image training, for guidance")
    hv_blur: int = count(1, "RECA: shrink the encoder's input by this factor and resize it back, a bottleneck")
    language: LlamaSizes = config_field(LlamaSizes, "")
    vision: VisionSizes = config_field(VisionSizes, "")
    codec: str = config_field("vq", "image tokenizer: vq, or patches (a codebook of pixel patches)", ("vq", "patches"))
    vq: VqSizes = config_field(VqSizes, "")
    patches: CodebookSizes = config_field(CodebookSizes, "")
    head_width: Optional[int] = count(None, "hidden width of the code head; null: the language model's")
    seed: int = config_field(0, "seed of a random initialisation", least=0)
