"""Recipe keys of Harmon. The defaults are Harmon-1.5B at 512 px."""

from dataclasses import dataclass
from typing import Optional

from reca.options import option


@dataclass
class LanguageSizes:
    hidden_size: int = option(1536, "width of the Qwen2 language model")
    num_hidden_layers: int = option(28, "its layers")
    num_attention_heads: int = option(12, "its query heads")
    num_key_value_heads: int = option(2, "its key and value heads")
    intermediate_size: int = option(8960, "width of its MLP")
    vocab_size: int = option(151936, "tokens; the output head is the embedding table")
    rms_norm_eps: float = option(1e-6, "its RMSNorm epsilon")
    rope_theta: float = option(1e6, "base of its rotary frequencies")


@dataclass
class MarSizes:
    width: int = option(1280, "width of MAR's encoder and decoder")
    encoder_depth: int = option(20, "blocks of the encoder")
    decoder_depth: int = option(20, "blocks of the decoder")
    heads: int = option(16, "attention heads of both")
    decoder_width: Optional[int] = option(None, "width of the decoder where it is another than the encoder's")
    decoder_heads: Optional[int] = option(None, "heads of the decoder where they are others than the encoder's")
    mlp_ratio: float = option(4.0, "width of a block's MLP over its own width")
    patch_size: int = option(1, "latents on the side of a token")
    base_grid: int = option(16, "tokens on the side of the grid that the position tables were made for")
    buffers: int = option(64, "buffer tokens in front of the image")
    head_depth: int = option(12, "residual blocks of the diffusion head")
    head_width: int = option(1536, "width of the diffusion head")
    classes: int = option(1000, "rows of MAR's class table, which nothing reads")
    mask_ratio_min: float = option(0.7, "smallest share of tokens that training hides")
    repeats: int = option(4, "timesteps that the diffusion loss draws for every hidden token")
    dropout: float = option(0.1, "dropout in attention and MLP while training, h_v's pass included")


@dataclass
class AutoencoderSizes:
    channels: int = option(128, "kl16: channels of the first level")
    multipliers: list[int] = option(lambda: [1, 1, 2, 2, 4], "kl16: channels per level, over the first")
    blocks: int = option(2, "kl16: residual blocks per level; the decoder has one more")
    patch: int = option(4, "patches: pixels on the side of a latent")
    latent_channels: int = option(16, "channels of a latent")
    scale: float = option(0.2325, "latents are multiplied by this")


@dataclass
class HarmonConfig:
    weights: Optional[str] = option(
        None, "a weight file, or a folder or hub id with one; owner/name/file names a file of the hub; null: random"
    )
    vae_weights: Optional[str] = option(None, "kl16.ckpt; null: the vae.* part of weights, or kl16.ckpt beside it")
    tokenizer: Optional[str] = option(None, "hub id or folder of the Qwen2.5 tokenizer; null: a word list if random")
    words: list[str] = option(list, "vocabulary of the word tokenizer that a random model uses")
    language: LanguageSizes = option(LanguageSizes, "")
    mar: MarSizes = option(MarSizes, "")
    codec: str = option(
        "kl16", "kl16, or patches (linear; stands in for it in the embedded world)", ("kl16", "patches")
    )
    autoencoder: AutoencoderSizes = option(AutoencoderSizes, "")
    image_size: int = option(512, "pixels on the side of a picture, drawn or asked about", least=1)
    understanding_size: Optional[int] = option(
        None,
        "pixels on the side of the picture that RECA's h_v is made of; null: image_size, as released",
        least=1,
    )
    hv_blur: int = option(1, "RECA: shrink by this and resize back what h_v is made of (a tighter bottleneck)", least=1)
    hv_grad_scale: float = option(0.1, "what the gradient that reaches the encoder through h_v is multiplied by")
    text_drop: float = option(0.1, "share of templates and captions that become the unconditional text; h_v stays")
    parity: bool = option(False, "hide the same number of tokens in all samples of a micro-batch, as the release does")
    seed: int = option(0, "of a random initialisation")


def tiny() -> HarmonConfig:
    """A random model of about 0.3 M parameters with the wiring of the real one."""
    return HarmonConfig(
        language=LanguageSizes(64, 2, 4, 2, 144, 128),
        mar=MarSizes(48, 2, 2, 4, base_grid=5, buffers=4, head_depth=2, head_width=64, classes=10),
        codec="patches",
        autoencoder=AutoencoderSizes(patch=4, latent_channels=24, scale=0.5),
        image_size=20,
    )
