"""Published files of Harmon <-> this module tree. Everything but the VAE has its published name here already."""

from pathlib import Path

from torch import Tensor

from reca.models.common.ldm_autoencoder import to_diffusers
from reca.models.common.weight_files import read_tensors, weight_file

HEAD, TABLE = "llm.lm_head.weight", "llm.model.embed_tokens.weight"  # one tensor
FILE, VAE_FILE = "harmon.pth", "kl16.ckpt"


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
    return to_diffusers({n: t for n, t in read_tensors(path).items() if n.startswith(parts)}, levels)
