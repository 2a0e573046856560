"""Convert the state dict of a KL autoencoder between LDM's names (latent diffusion, KL-16, FLUX) and diffusers'.

Two differences go beyond names. The decoder's levels are numbered from the latent in diffusers and from the image in
LDM. The projections of an attention block are linear layers in diffusers and 1 x 1 convolutions in LDM.
"""

import re
from collections.abc import Mapping

from torch import Tensor

# (LDM's name, diffusers' name); # stands for the same number in both
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
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before 0.17
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def to_diffusers(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename the tensors of an LDM file to diffusers' names. Other names are unchanged. levels: resolution levels."""
    renamed = {}
    for name, tensor in state.items():
        for ldm, diffusers in _PARTS:
            name = _replace(name, ldm, diffusers)
        name = _replace_attention(_reverse_levels(name, levels), _ATTENTION)
        renamed[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return renamed


def renew_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename attention projections written by diffusers before 0.17 to their current names."""
    return {_replace_attention(name, _OLD_ATTENTION): tensor for name, tensor in state.items()}


def to_ldm(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename the tensors of a state dict of diffusers' AutoencoderKL, the inverse of `to_diffusers`."""
    parts, renamed = {diffusers: ldm for ldm, diffusers in _ATTENTION.items()}, {}
    for name, tensor in state.items():
        tensor = tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        name = _replace_attention(_reverse_levels(name, levels), parts)
        for ldm, diffusers in _PARTS:
            name = _replace(name, diffusers, ldm)
        renamed[name] = tensor
    return renamed


def _replace(name: str, old: str, new: str) -> str:
    return re.sub(re.escape(old).replace(r"\#", r"(\d+)"), new.replace("#", r"\1"), name)


def _reverse_levels(name: str, levels: int) -> str:
    return re.sub(r"(?<=up_blocks\.)\d+", lambda match: str(levels - 1 - int(match.group())), name)


def _replace_attention(name: str, parts: Mapping[str, str]) -> str:
    match = re.search(r"attentions\.\d+\.(.+)\.(weight|bias)$", name)
    return f"{name[: match.start(1)]}{parts.get(match[1], match[1])}.{match[2]}" if match else name
