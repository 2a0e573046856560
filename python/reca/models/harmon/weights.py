"""Harmon's weights: load published files or initialise at random, and export.

Parameter names here are the published ones, except that the codec has diffusers' names.
"""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.io.paths import is_file
from reca.models.common.chat import WORDS
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch, fetch_tokenizer
from reca.models.common.ldm_autoencoder import to_diffusers, to_ldm
from reca.models.common.text import check_tokenizer, read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta, init_random, read_tensors
from reca.models.harmon import prompt
from reca.models.harmon.config import HarmonConfig
from reca.models.harmon.modules import Network

N = TypeVar("N", bound=Network)

PARTS = ("llm", "mar", "proj_in", "proj_out")
HEAD, TABLE = "llm.lm_head.weight", "llm.model.embed_tokens.weight"  # tied
FILE, CODEC_FILE = "harmon.pth", "kl16.ckpt"
CODEC = "vae."  # prefix of the codec's names in a published file
# recipe key -> glob patterns of the files to download; codec_weights is a single file
DOWNLOADS = {"weights": ["*.json", "*.safetensors", "*.pth", "*.ckpt", "*.txt"], "tokenizer": TOKENIZER}


def load(cls: type[N], config: HarmonConfig, device: torch.device | str) -> N:
    """Build the model in fp32, from files or, if `config.weights` is None, with random weights.

    Raises ValueError for files that do not fit the recipe, listing missing, unexpected and misshapen tensors.
    """
    source = fetch(config.weights, DOWNLOADS["weights"]) if config.weights else None
    codec_file = fetch(config.codec_weights, key="model.codec_weights") if config.codec_weights else None
    tokenizer = load_tokenizer(config)
    if source is None:
        with init_random(config.seed, device):
            net = cls(config, tokenizer)
        if codec_file:
            assign_state_dict(net.codec, read_codec(codec_file, _levels(config)), str(codec_file), torch.float32)
        return net.to(device)
    with init_on_meta():
        net = cls(config, tokenizer)
    state, inside = read(source)
    assign_published(net, state, str(source))
    path = codec_file or beside(source) / CODEC_FILE
    if config.codec == "patches":
        codec = read_tensors(path)
    elif codec_file or (not inside and is_file(path)):
        codec = read_codec(path, _levels(config))
    elif inside:
        path, codec = source, to_diffusers(inside, _levels(config))
    else:
        raise ValueError(f"{source} contains no VAE; set model.codec_weights, such as wusize/harmon/{CODEC_FILE}")
    assign_state_dict(net.codec, codec, str(path), torch.float32)
    return net.to(device)


def assign_published(net: Network, state: dict[str, Tensor], source: str) -> None:
    """Assign `state`, everything but the codec, to the model. The output head stays tied to the embedding table."""
    head = state.get(HEAD)
    if head is not None and TABLE in state and not torch.equal(head, state[TABLE]):
        raise ValueError(f"{source}: {HEAD} differs from {TABLE}, but Harmon ties them; use a file with tied weights")
    if TABLE in state:
        state = state | {HEAD: state[TABLE]}
    assign_state_dict(published_parts(net), state, source, torch.float32)
    net.llm.lm_head.weight = net.llm.model.embed_tokens.weight


def export(net: Network, folder: Path) -> list[str]:
    """Write the published file, and next to it a codec and a tokenizer without a published source."""
    with export_to(folder) as out:
        out.pickled(FILE, published_parts(net).state_dict())
        if not net.config.codec_weights:
            codec = net.codec.state_dict()
            if net.config.codec == "kl16":
                codec = to_ldm(codec, _levels(net.config))
            out.pickled(CODEC_FILE, {"model": codec})
        if not net.config.tokenizer:
            out.tokenizer("tokenizer", net.tokenizer)
        return out.done()


def loading(config: HarmonConfig) -> str:
    """Return the model card's sentence on how Harmon's own code loads an export."""
    return (
        "[Harmon's code](https://github.com/wusize/Harmon) takes `harmon.pth` as `--checkpoint`, in place of the "
        "published file of the same size; the autoencoder `kl16.ckpt` is that of wusize/harmon."
    )


def published_parts(net: Network) -> nn.ModuleDict:
    """Return the modules of Harmon's weight file, under their published names."""
    return nn.ModuleDict({part: getattr(net, part) for part in PARTS})


def load_tokenizer(config: HarmonConfig, local: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or build a word tokenizer for a random model.

    Raises ValueError if there is none, or if it lacks tokens of Qwen's chat format or has too many tokens.
    """
    source = fetch_tokenizer(config, DOWNLOADS, local)
    if source is None:
        tokenizer = word_tokenizer([*config.words, *WORDS], prompt.SPECIAL_TOKENS)
    elif config.tokenizer:
        tokenizer = read_tokenizer(source)
    else:
        found = next((f for f in (source / "tokenizer", source) if is_file(f / "tokenizer_config.json")), None)
        if found is None:
            raise ValueError(
                f"{source.absolute()} contains no tokenizer; set model.tokenizer, such as "
                "model.tokenizer=Qwen/Qwen2.5-1.5B-Instruct"
            )
        tokenizer = read_tokenizer(found)
    check_tokenizer(tokenizer, prompt.SPECIAL_TOKENS, config.language.vocab_size, "Harmon")
    return tokenizer


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the state dicts (model, codec) of a published file or folder. The codec has LDM's names; {} if absent.

    Raises ValueError for a folder without exactly one weight file of the model.
    """
    state = read_tensors(path, ignore=(CODEC_FILE,))
    codec = {n.removeprefix(CODEC): t for n, t in state.items() if n.startswith(CODEC)}
    return {n: t for n, t in state.items() if not n.startswith(CODEC)}, codec


def read_codec(path: Path, levels: int) -> dict[str, Tensor]:
    """Read kl16.ckpt with diffusers' names, without tensors of other modules, such as its loss."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return to_diffusers({n: t for n, t in read_tensors(path).items() if n.startswith(parts)}, levels)


def _levels(config: HarmonConfig) -> int:
    return len(config.autoencoder.multipliers)
