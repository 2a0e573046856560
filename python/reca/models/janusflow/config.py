"""Recipe keys of JanusFlow. The defaults are those of the published 1.3B model."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codec import PatchSizes
from reca.models.janus.config import SYSTEM_PROMPT, LlamaSizes, VisionSizes
from reca.options.fields import HUB, config_field, count, pixels, share


@dataclass
class GenerationSizes:
    width: int = count(768, "channels of the generation encoder; the decoder has twice as many")
    encoder_blocks: int = count(2, "ConvNeXt blocks of the encoder")
    decoder_blocks: int = count(2, "ConvNeXt blocks of the decoder")
    norm_eps: float = config_field(1e-6, "epsilon of their RMSNorms", above=0)


@dataclass
class AutoencoderSizes:
    block_out_channels: list[int] = count(lambda: [128, 256, 512, 512], "channels per level, outermost first")
    layers_per_block: int = count(2, "residual blocks per encoder level; a decoder level has one more")
    latent_channels: int = count(4, "channels of a latent")
    scaling_factor: float = config_field(0.13025, "factor of the latents", above=0)


@dataclass
class JanusFlowConfig:
    weights: Optional[str] = config_field(None, "hub id or folder of JanusFlow; null: random", path=HUB)
    codec_weights: Optional[str] = config_field(
        None, "hub id or folder of SDXL's autoencoder in diffusers layout; null: in the folder of weights", path=HUB
    )
    tokenizer: Optional[str] = config_field(
        None, "hub id or folder of the tokenizer; null: that of weights, `words` without weights", path=HUB
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer of a random model")
    dtype: str = config_field(
        "fp32",
        "dtype of language model, generation encoder and decoder; the rest is fp32",
        ("fp32", "bf16"),
    )
    image_size: int = pixels(384, "size in pixels of a generated image")
    max_length: int = count(4096, "maximum tokens of a training sequence; texts are truncated (the paper's context)")
    system_prompt: str = config_field(SYSTEM_PROMPT, "text before a conversation about an image")
    reca_system_prompt: str = config_field(
        "", "text before the image in RECA; empty by default, as in text-to-image prompts"
    )
    reca_drop: float = share(0.1, "share of samples whose h_v and template are dropped in RECA, for guidance")
    caption_drop: float = share(0.1, "share of captions dropped in text-to-image training, for guidance")
    hv_blur: int = count(1, "RECA: shrink the encoder's input by this factor and resize it back, a bottleneck")
    language: LlamaSizes = config_field(LlamaSizes, "")
    vision: VisionSizes = config_field(VisionSizes, "")
    generation: GenerationSizes = config_field(GenerationSizes, "")
    codec: str = config_field(
        "sdxl", "image autoencoder: sdxl, or patches (linear, for toy datasets)", ("sdxl", "patches")
    )
    autoencoder: AutoencoderSizes = config_field(AutoencoderSizes, "sdxl's sizes")
    patches: PatchSizes = config_field(PatchSizes, "patches' sizes")
    seed: int = config_field(0, "seed of a random initialisation", least=0)
