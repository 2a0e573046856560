"""Building a Harmon from published files or at random, and writing it back."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch
from reca.models.common.ldm_autoencoder import to_diffusers, to_ldm
from reca.models.common.text import check_tokenizer, read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta, read_tensors
from reca.models.harmon import convert, prompt
from reca.models.harmon.config import HarmonConfig

if TYPE_CHECKING:
    from reca.models.harmon.adapter import Harmon

PARTS = ("llm", "mar", "proj_in", "proj_out")


def load(cls: type["Harmon"], config: HarmonConfig, device: torch.device | str) -> "Harmon":
    """The model in fp32; random where `config.weights` is null, and from files otherwise.

    Raises ValueError for files that do not fit the recipe, with the lists of what is missing, left over or misshapen.
    """
    source = fetch(config.weights, ["*.json", "*.safetensors", "*.pth", "*.ckpt", "*.txt"]) if config.weights else None
    tokenizer = load_tokenizer(config, source)
    if source is None:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(config.seed)
            model = cls(config, tokenizer)
        if config.vae_weights:
            vae = convert.read_vae(fetch(config.vae_weights, key="model.vae_weights"), _levels(config))
            assign_state_dict(model.vae, vae, config.vae_weights, torch.float32)
        return model.to(device)
    with init_on_meta():
        model = cls(config, tokenizer)
    state, vae = convert.read(source)
    put_trained(model, state, str(source))
    near = beside(source) / convert.VAE_FILE
    if config.codec == "patches":
        path = fetch(config.vae_weights, key="model.vae_weights") if config.vae_weights else near
        assign_state_dict(model.vae, read_tensors(path), str(path), torch.float32)
    else:
        if config.vae_weights or (not vae and near.is_file()):
            path = fetch(config.vae_weights, key="model.vae_weights") if config.vae_weights else near
            vae = convert.read_vae(path, _levels(config))
        elif vae:
            vae = to_diffusers(vae, _levels(config))
        else:
            raise ValueError(f"{source} holds no VAE; give model.vae_weights, such as wusize/harmon/{convert.VAE_FILE}")
        assign_state_dict(model.vae, vae, config.vae_weights or str(source), torch.float32)
    return model.to(device)


def put_trained(model: "Harmon", state: dict[str, torch.Tensor], source: str) -> None:
    """Make `state`, everything but the VAE, the parameters of the model. The output head stays the embedding table."""
    head = state.get(convert.HEAD)
    if head is not None and convert.TABLE in state and not torch.equal(head, state[convert.TABLE]):
        raise ValueError(f"{source}: {convert.HEAD} differs from {convert.TABLE}; Harmon's two are one tensor")
    if convert.TABLE in state:
        state = state | {convert.HEAD: state[convert.TABLE]}
    assign_state_dict(trained(model), state, source, torch.float32)
    model.llm.lm_head.weight = model.llm.model.embed_tokens.weight


def trained(model: "Harmon") -> nn.ModuleDict:
    """The parts that Harmon's weight file holds, under their published names."""
    return nn.ModuleDict({part: getattr(model, part) for part in PARTS})


def export(model: "Harmon", folder: Path) -> list[str]:
    with export_to(folder) as out:
        out.pickled(convert.FILE, trained(model).state_dict())
        if not model.config.vae_weights:
            vae = model.vae.state_dict()
            if model.config.codec == "kl16":
                vae = to_ldm(vae, _levels(model.config))
            out.pickled(convert.VAE_FILE, {"model": vae})
        if not model.config.tokenizer:
            out.tokenizer("tokenizer", model.tokenizer)
        return out.done()


def load_tokenizer(config: HarmonConfig, source: Path | None) -> PreTrainedTokenizerBase:
    """Raises ValueError when there is none, or one that does not know Qwen's chat format or is too large."""
    if config.tokenizer:
        tokenizer = read_tokenizer(fetch(config.tokenizer, TOKENIZER, "model.tokenizer"))
    elif source is None:
        tokenizer = word_tokenizer([*config.words, *prompt.WORDS], prompt.SPECIAL_TOKENS)
    else:
        folder = beside(source).absolute()
        found = next((f for f in (folder / "tokenizer", folder) if (f / "tokenizer_config.json").is_file()), None)
        if found is None:
            raise ValueError(f"{folder} has no tokenizer beside {source.name}; give model.tokenizer, such as "
                             "model.tokenizer=Qwen/Qwen2.5-1.5B-Instruct")  # fmt: skip
        tokenizer = read_tokenizer(found)
    check_tokenizer(tokenizer, prompt.SPECIAL_TOKENS, config.language.vocab_size, "Harmon")
    return tokenizer


def _levels(config: HarmonConfig) -> int:
    return len(config.autoencoder.multipliers)
