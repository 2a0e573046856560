"""Building a BAGEL from published files or at random, and writing it back."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.models.bagel import convert, prompt
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.modules import FluxCodec, PositionTable
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch
from reca.models.common.ldm_autoencoder import to_diffusers, to_ldm
from reca.models.common.text import read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta

if TYPE_CHECKING:
    from reca.models.bagel.adapter import Bagel

# the parts that the main file holds, under their published names
PARTS = (
    "language_model", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed", "vit_pos_embed", "connector",
    "vit_model",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def load(cls: type["Bagel"], config: BagelConfig) -> "Bagel":
    """The model on the CPU.

    Raises ValueError for files that do not fit the recipe, with the lists of what is missing, left over or misshapen.
    """
    if config.weights is None:
        if config.overlay or config.codec_weights:
            raise ValueError("model.overlay and model.codec_weights need model.weights, which is null")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return as_kept(cls(config, load_tokenizer(config, None)))
    source = fetch(config.weights, convert.HUB)
    folder = beside(source)
    convert.check(folder, config)
    with init_on_meta():
        model = cls(config, load_tokenizer(config, folder))
    state = convert.read(source)
    if config.overlay:
        state |= convert.read(fetch(config.overlay, convert.HUB, "model.overlay"))
    for name in list(state):  # one by one, so that no second copy of all stands in memory
        if state[name].is_floating_point():
            state[name] = state[name].to(_dtype(model, name))
    assign_state_dict(published(model), state, str(source))
    for table in model.modules():
        if isinstance(table, PositionTable):
            table.pos_embed = table.table()
    codec = fetch(config.codec_weights, convert.HUB, "model.codec_weights") if config.codec_weights else folder
    _load_codec(model.codec, codec)
    return model


def as_kept(model: "Bagel") -> "Bagel":
    """Its parameters in the types that they are kept in."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_dtype(model, name))
    return model


def export(model: "Bagel", folder: Path, dtype: torch.dtype) -> list[str]:
    """All files of a published folder, those of the frozen parts too."""
    codec = model.codec.state_dict()
    if isinstance(model.codec, FluxCodec):
        codec = to_ldm(model.codec.autoencoder.state_dict(), len(model.codec.sizes.block_out_channels))
    with export_to(folder) as out:
        out.tensors(convert.PUBLISHED, {n: t.to(dtype) for n, t in published(model).state_dict().items()})
        out.tensors(convert.CODEC, codec)
        for name, content in convert.described(model.config, model.vocabulary.bos, model.vocabulary.eos).items():
            out.json(name, content)
        out.tokenizer(".", model.tokenizer)
        return out.done()


def published(model: "Bagel") -> nn.ModuleDict:
    return nn.ModuleDict({name: getattr(model, name) for name in PARTS})


def load_tokenizer(config: BagelConfig, folder: Path | None) -> PreTrainedTokenizerBase:
    source = fetch(config.tokenizer, TOKENIZER, "model.tokenizer") if config.tokenizer else folder
    if source is None:
        tokenizer = word_tokenizer(config.words, prompt.SPECIAL_TOKENS)
    elif any((source / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(source)
    else:
        raise ValueError(
            f"{source.absolute()} holds no tokenizer ({', '.join(TOKENIZER_FILES)}); give model.tokenizer, such as "
            "model.tokenizer=ByteDance-Seed/BAGEL-7B-MoT"
        )
    if len(tokenizer) > config.language.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but model.language.vocab_size={config.language.vocab_size}; "
            "raise it, or give the tokenizer that belongs to the weights"
        )
    return tokenizer


def _load_codec(codec: nn.Module, source: Path) -> None:
    path = source / convert.CODEC if source.is_dir() else source
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give model.codec_weights, the FLUX autoencoder that BAGEL publishes")
    state: dict[str, Tensor] = convert.read(path)
    if not isinstance(codec, FluxCodec):
        assign_state_dict(codec, state, str(path), torch.float32)
        return
    levels = len(codec.sizes.block_out_channels)
    assign_state_dict(codec.autoencoder, to_diffusers(state, levels), str(path), torch.float32)


def _dtype(model: "Bagel", name: str) -> torch.dtype:
    """The type a tensor is kept in."""
    kept, role = model.config.dtype, model.role(name)
    if role == "codec" or kept == "fp32" or (kept == "mixed" and role in model.trainable_roles):
        return torch.float32
    return torch.bfloat16
