"""Recipe keys of BAGEL. The defaults are those of BAGEL-7B-MoT."""

from dataclasses import dataclass
from typing import Optional

from reca.models.common.patch_codec import PatchSizes
from reca.models.common.qwen2 import Qwen2Sizes
from reca.options.fields import HUB, RecipeError, config_field, count, pixels, share


@dataclass
class VisionSizes:
    hidden_size: int = count(1152, "width of SigLIP")
    num_hidden_layers: int = count(27, "layers of the original tower; the last is neither stored nor run")
    num_attention_heads: int = count(16, "its heads")
    intermediate_size: int = count(4304, "width of its MLP")
    image_size: int = pixels(980, "size in pixels of the square that its position tables cover")
    patch_size: int = count(14, "size in pixels of a patch, which is one token of h_v")
    layer_norm_eps: float = config_field(1e-6, "its LayerNorm epsilon", above=0)


@dataclass
class AutoencoderSizes:
    block_out_channels: list[int] = count(lambda: [128, 256, 512, 512], "channels per level, outermost first")
    layers_per_block: int = count(2, "residual blocks per encoder level; a decoder level has one more")
    latent_channels: int = count(16, "channels of a latent")
    scaling_factor: float = config_field(0.3611, "factor of the latents, after the shift is subtracted", above=0)
    shift_factor: float = config_field(0.1159, "the shift, subtracted from the latents")


@dataclass
class BagelConfig:
    weights: Optional[str] = config_field(
        None, "hub id or folder of BAGEL-7B-MoT, or a weight file in such a folder; null: random", path=HUB
    )
    overlay: Optional[str] = config_field(
        None, "a second weight file, whose tensors replace those of weights: the format of RECA results", path=HUB
    )
    codec_weights: Optional[str] = config_field(
        None, "hub id, folder or file of ae.safetensors; null: in the folder of weights", path=HUB
    )
    tokenizer: Optional[str] = config_field(
        None, "hub id or folder of the tokenizer; null: in the folder of weights, `words` without weights", path=HUB
    )
    words: list[str] = config_field(list, "vocabulary of the word tokenizer of a random model")
    dtype: str = config_field(
        "fp32",
        "dtype of the weights; mixed: fp32 for the parts that RECA trains, bf16 for the rest. The codec stays fp32",
        ("fp32", "bf16", "mixed"),
    )
    language: Qwen2Sizes = config_field(lambda: Qwen2Sizes(3584, 28, 28, 4, 18944, 152064), "")
    vision: VisionSizes = config_field(VisionSizes, "")
    codec: str = config_field(
        "flux",
        "image autoencoder: flux, or patches (linear, for toy datasets)",
        ("flux", "patches"),
    )
    autoencoder: AutoencoderSizes = config_field(AutoencoderSizes, "")
    patches: PatchSizes = config_field(PatchSizes, "")
    latent_patch_size: int = count(2, "latents per image token in height and width")
    max_latent_size: int = count(64, "side in image tokens of the latents' position table: the largest image")
    image_size: int = pixels(1024, "longest side in pixels of a target or an image to edit; generated ones are square")
    image_min_size: int = pixels(512, "shortest side of a target or an image to edit")
    understanding_size: int = pixels(224, "RECA: longest side in pixels of h_v's image")
    hv_source: str = config_field(
        "vit",
        "RECA: source of h_v: vit, or vae, the codec's latents (an ablation; the model learns to copy)",
        ("vit", "vae"),
    )
    hv_blur: int = count(1, "RECA: shrink the encoder's input by this factor and resize it back, a bottleneck")
    answer_size: int = pixels(980, "longest side in pixels of an image in a conversation")
    answer_min_size: int = pixels(378, "shortest side of an image in a conversation")
    edit_size: int = pixels(980, "longest side in pixels of SigLIP's input when an image is edited")
    edit_min_size: int = pixels(224, "shortest side of SigLIP's input when an image is edited")
    template_drop: float = share(0.1, "RECA: share of samples whose template is dropped; h_v never is")
    caption_drop: float = share(0.1, "share of captions dropped in text-to-image training, for guidance")
    srum_constraint: float = config_field(
        0.1, "SRUM: weight of the constraint term, relative to rewards in [-1, 1]", least=0
    )
    timestep_shift: float = config_field(
        1.0, "training: above 1, noise levels are shifted towards pure noise; sampling has its own shift", above=0
    )
    parity: bool = config_field(False, "round noise levels, latents and noisy latents to bf16, as in the release")
    seed: int = config_field(0, "seed of a random initialisation", least=0)

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
                    f"{prefix}{name}={getattr(self, name)} must be at most {prefix}vision.image_size={covered}, the "
                    "size of the position tables"
                )
