"""Recipe keys of BAGEL. The defaults are BAGEL-7B-MoT."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codec import PatchSizes
from reca.models.common.qwen2 import Qwen2Sizes
from reca.options import HUB, RecipeError, config_field, count, pixels, share


@dataclass
class VisionSizes:
    hidden_size: int = count(1152, "width of SigLIP")
    num_hidden_layers: int = count(27, "layers of the published tower; the last is neither stored nor run")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4304, "width of its MLP")
    image_size: int = pixels(980, "height and width in pixels of the square that its position tables cover")
    patch_size: int = count(14, "height and width of a patch in pixels; one patch is one token of h_v")
    layer_norm_eps: float = config_field(1e-6, "its LayerNorm epsilon", above=0)


@dataclass
class AutoencoderSizes:
    block_out_channels: list[int] = count(lambda: [128, 256, 512, 512], "channels per level, outermost first")
    layers_per_block: int = count(2, "residual blocks per encoder level; a decoder level has one more")
    latent_channels: int = count(16, "channels of a latent")
    scaling_factor: float = config_field(
        0.3611, "latents are multiplied by this, after the shift is taken off", above=0
    )
    shift_factor: float = config_field(0.1159, "the shift")


@dataclass
class BagelConfig:
    weights: Optional[str] = config_field(
        None, "hub id or folder of BAGEL-7B-MoT, or a weight file in such a folder; null: random", path=HUB
    )
    overlay: Optional[str] = config_field(
        None, "a second weight file, whole or in part, put over the first, as RECA results are published", path=HUB
    )
    codec_weights: Optional[str] = config_field(
        None, "hub id, folder or file of ae.safetensors; null: beside weights", path=HUB
    )
    tokenizer: Optional[str] = config_field(
        None, "hub id or folder of the tokenizer; null: beside weights, or `words`", path=HUB
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer that a random model uses")
    dtype: str = config_field(
        "fp32",
        "type the weights are kept in; mixed: fp32 for what RECA trains, bf16 for the rest. The codec stays fp32",
        ("fp32", "bf16", "mixed"),
    )
    language: Qwen2Sizes = config_field(lambda: Qwen2Sizes(3584, 28, 28, 4, 18944, 152064), "")
    vision: VisionSizes = config_field(VisionSizes, "")
    codec: str = config_field(
        "flux",
        "image autoencoder: flux, or patches (linear; stands in for it in the toy world)",
        ("flux", "patches"),
    )
    autoencoder: AutoencoderSizes = config_field(AutoencoderSizes, "")
    patches: PatchSizes = config_field(PatchSizes, "")
    latent_patch_size: int = count(2, "latents per image token in height and width")
    max_latent_size: int = count(64, "height and width of the largest image in image tokens: its position table")
    image_size: int = pixels(1024, "longest side in pixels of a target or an image to edit; generated ones are square")
    image_min_size: int = pixels(512, "its shortest side")
    understanding_size: int = pixels(224, "RECA: longest side in pixels of what h_v is made of")
    hv_source: str = config_field(
        "vit", "RECA: h_v comes from vit, or from vae, the codec's latents (an ablation that copies)", ("vit", "vae")
    )
    hv_blur: int = count(1, "RECA: shrink by this and resize back what h_v is made of (a tighter bottleneck)")
    answer_size: int = pixels(980, "longest side in pixels of an image to answer about")
    answer_min_size: int = pixels(378, "its shortest side")
    edit_size: int = pixels(980, "longest side in pixels of what SigLIP sees of an image to edit")
    edit_min_size: int = pixels(224, "its shortest side")
    template_drop: float = share(0.1, "RECA: share of samples that lose their template; h_v always stays")
    caption_drop: float = share(0.1, "share of captions that text-to-image training drops, for guidance")
    srum_constraint: float = config_field(
        0.1, "SRUM: weight of the error against the image to stay near, beside scores from -1 to 1", least=0
    )
    timestep_shift: float = config_field(
        1.0, "training: above 1, noise levels move towards pure noise; sampling has its own", above=0
    )
    parity: bool = config_field(False, "round noise levels, latents and noisy latents to bf16 as the release does")
    seed: int = config_field(0, "of a random initialisation", least=0)

    def check(self, prefix: str) -> None:
        """Raise RecipeError for an image size that SigLIP's position tables do not cover."""
        covered, patch = self.vision.image_size, self.vision.patch_size
        if covered % patch:
            raise RecipeError(
                f"{prefix}vision.image_size={covered} must be a multiple of {prefix}vision.patch_size={patch}"
            )
        for name in ("understanding_size", "answer_size", "edit_size"):
            if getattr(self, name) > covered:
                raise RecipeError(
                    f"{prefix}{name}={getattr(self, name)} must be at most {prefix}vision.image_size={covered}, which "
                    "the position tables cover"
                )
