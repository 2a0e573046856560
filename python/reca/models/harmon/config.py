"""Recipe keys of Harmon. The defaults are those of Harmon-1.5B at 512 px."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.qwen2 import Qwen2Sizes
from reca.options.fields import HUB, config_field, count, pixels, share


@dataclass
class MarSizes:
    width: int = count(1280, "width of MAR's encoder and decoder")
    encoder_depth: int = count(20, "blocks of the encoder")
    decoder_depth: int = count(20, "blocks of the decoder")
    heads: int = count(16, "attention heads of both")
    decoder_width: Optional[int] = count(None, "width of the decoder; null: that of the encoder")
    decoder_heads: Optional[int] = count(None, "attention heads of the decoder; null: those of the encoder")
    mlp_ratio: float = config_field(4.0, "width of a block's MLP relative to the block's", least=0.1, most=2**10)
    patch_size: int = count(1, "size in latents of a token")
    base_grid: int = count(16, "side in tokens of the grid that the position embeddings were trained for")
    buffers: int = count(64, "buffer tokens before the image")
    head_depth: int = count(12, "residual blocks of the diffusion head")
    head_width: int = count(1536, "width of the diffusion head")
    classes: int = count(1000, "rows of MAR's class table, which is unused")
    mask_ratio_min: float = share(0.7, "minimum share of tokens masked in training")
    repeats: int = count(4, "timesteps that the diffusion loss draws for every masked token")
    dropout: float = config_field(
        0.1, "dropout of attention and MLP in training, also when h_v is encoded", least=0, below=1
    )


@dataclass
class AutoencoderSizes:
    channels: int = count(128, "kl16: channels of the first level")
    multipliers: list[int] = count(lambda: [1, 1, 2, 2, 4], "kl16: channels per level, relative to the first")
    blocks: int = count(2, "kl16: residual blocks per level of the encoder; the decoder has one more")
    patch: int = count(4, "patches: size in pixels of a latent")
    latent_channels: int = count(16, "channels of a latent")
    scale: float = config_field(0.2325, "factor of the latents", above=0)


@dataclass
class HarmonConfig:
    weights: Optional[str] = config_field(
        None,
        "a weight file, or a folder or hub id with one; owner/name/file names a file of the hub; null: random",
        path=HUB,
    )
    codec_weights: Optional[str] = config_field(
        None, "kl16.ckpt; null: the vae.* part of weights, or kl16.ckpt in the same folder", path=HUB
    )
    tokenizer: Optional[str] = config_field(
        None, "hub id or folder of the Qwen2.5 tokenizer; null: a word list if random", path=HUB
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer of a random model")
    language: Qwen2Sizes = config_field(Qwen2Sizes, "")
    mar: MarSizes = config_field(MarSizes, "")
    codec: str = config_field("kl16", "kl16, or patches (linear, for toy datasets)", ("kl16", "patches"))
    autoencoder: AutoencoderSizes = config_field(AutoencoderSizes, "")
    image_size: int = pixels(512, "size in pixels of an image, generated or asked about")
    understanding_size: Optional[int] = pixels(
        None, "size in pixels of the image that RECA's h_v is computed from; null: image_size, as released"
    )
    hv_blur: int = count(1, "RECA: shrink the encoder's input by this factor and resize it back, a bottleneck")
    hv_grad_scale: float = config_field(0.1, "factor of the gradient that reaches the encoder through h_v", least=0)
    text_drop: float = share(0.1, "share of templates and captions replaced by the unconditional text; h_v is kept")
    parity: bool = config_field(
        False, "mask the same number of tokens in all samples of a micro-batch, as in the release"
    )
    seed: int = config_field(0, "seed of a random initialisation", least=0)
