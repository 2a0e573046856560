"""Published files of Harmon <-> this module tree. Everything but the VAE has its published name here already."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reca.models.weights import read_tensors, weight_file

HEAD, TABLE = "llm.lm_head.weight", "llm.model.embed_tokens.weight"  # one tensor
FILE, VAE_FILE = "harmon.pth", "kl16.ckpt"

# latent diffusion's name, diffusers' name; # is a number that stays
_PARTS = (
    ("encoder.down.#.block.", "encoder.down_blocks.#.resnets."),
    ("encoder.down.#.attn.", "encoder.down_blocks.#.attentions."),
    ("encoder.down.#.downsample.conv.", "encoder.down_blocks.#.downsamplers.0.conv."),
    ("decoder.up.#.block.", "decoder.up_blocks.#.resnets."),
    ("decoder.up.#.upsample.conv.", "decoder.up_blocks.#.upsamplers.0.conv."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    ("coder.norm_out.", "coder.conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def vae_native(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """KL-16 in latent diffusion's names -> diffusers' names. Levels of the decoder count from the other end there."""
    native = {}
    for name, tensor in state.items():
        for published, ours in _PARTS:
            name = _renamed(name, published, ours)
        name = _attention(_flipped(name, levels), _ATTENTION)
        native[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return native


def vae_published(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The way back. What is a linear layer in diffusers is a convolution of one pixel there."""
    parts, published = {ours: name for name, ours in _ATTENTION.items()}, {}
    for name, tensor in state.items():
        tensor = tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        name = _attention(_flipped(name, levels), parts)
        for theirs, ours in _PARTS:
            name = _renamed(name, ours, theirs)
        published[name] = tensor
    return published


def _renamed(name: str, old: str, new: str) -> str:
    return re.sub(re.escape(old).replace(r"\#", r"(\d+)"), new.replace("#", r"\1"), name)


def _flipped(name: str, levels: int) -> str:
    return re.sub(r"(?<=up_blocks\.)\d+", lambda match: str(levels - 1 - int(match.group())), name)


def _attention(name: str, parts: Mapping[str, str]) -> str:
    match = re.search(r"attentions\.\d+\.(.+)\.(weight|bias)$", name)
    return f"{name[: match.start(1)]}{parts[match[1]]}.{match[2]}" if match else name


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(model, vae) of a published file or folder; the VAE as published without prefix, empty where there is none of it.

    Raises ValueError for a folder in which no weight file can be told to be the model's.
    """
    state = read_tensors(weight_file(path, ignore=(VAE_FILE,)) if path.is_dir() else path)
    vae = {n.removeprefix("vae."): t for n, t in state.items() if n.startswith("vae.")}
    return {n: t for n, t in state.items() if not n.startswith("vae.")}, vae


def read_vae(path: Path, levels: int) -> dict[str, Tensor]:
    """kl16.ckpt in diffusers' names; what belongs to no encoder or decoder (a loss, say) is left out."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return vae_native({n: t for n, t in read_tensors(path).items() if n.startswith(parts)}, levels)
