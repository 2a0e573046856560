"""Building a Show-o from published folders or at random, and writing it back."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch
from reca.models.common.text import read_tokenizer
from reca.models.common.tiny_tokenizer import UNKNOWN, word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta
from reca.models.show_o import convert, prompt
from reca.models.show_o.config import ShowOConfig

if TYPE_CHECKING:
    from reca.models.show_o.adapter import ShowO

PHI_TOKENS = 50295  # of Phi-1.5's tokenizer, before Show-o's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HUB = ["*.json", "*.safetensors", "*.bin"]  # what there is to download


def load(cls: type["ShowO"], config: ShowOConfig) -> "ShowO":
    """The model on the CPU. Parts without a source are random if `config.weights` is null, an error otherwise.

    Raises ValueError for folders that do not fit the recipe, with the lists of what is missing, left over or misshapen.
    """
    folder = fetch(config.weights, HUB) if config.weights else None
    tokenizer = load_tokenizer(config, folder)
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = cls(config, tokenizer)
        model.showo.to(DTYPES[config.dtype])
    else:
        with init_on_meta():
            model = cls(config, tokenizer)
        convert.check(convert.published(folder), described(model), str(folder))
        assign_state_dict(trained(model), convert.read(folder), str(folder), DTYPES[config.dtype])
    if source := _part_source(config.codec_weights, folder, "codec"):
        assign_state_dict(model.codec, convert.read(source), str(source), torch.float32)
    if model.uses_clip and (source := _part_source(config.clip_weights, folder, "clip")):
        tower = convert.clip_tower(convert.read(source), config.clip.num_hidden_layers - 1)
        assign_state_dict(model.clip, tower, str(source), torch.float32)
    return model


def build_meta(cls: type["ShowO"], config: ShowOConfig) -> "ShowO":
    """The model of `load` with weights of any value. A tokenizer on this machine is read, for its number of tokens."""
    folder = Path(config.weights).expanduser() if config.weights else None
    own = Path(config.tokenizer).expanduser() if config.tokenizer else folder and beside(folder) / "tokenizer"
    if own and not own.is_dir():
        words = [f"word{i}" for i in range(PHI_TOKENS - len((UNKNOWN, *prompt.WORDS, prompt.END_OF_TEXT)))]
        config, folder = replace(config, tokenizer=None, words=words), None
    model = cls(config, load_tokenizer(config, folder))
    for parameter in (trained(model) if config.weights else model.showo).parameters():
        parameter.data = parameter.data.to(DTYPES[config.dtype])  # Module.to cannot, of tensors without memory
    return model


def export(model: "ShowO", folder: Path) -> list[str]:
    config = {
        "_class_name": "Showo",
        "_diffusers_version": "0.30.1",
        **{key: value for key, (value, _) in described(model).items()},
        "llm_model_path": "microsoft/phi-1_5",
        "load_from_showo": True,
    }
    parts = {"": (config, trained(model))}
    if not model.config.codec_weights:
        parts["codec/"] = ({}, model.codec)
    if model.uses_clip and not model.config.clip_weights:
        parts["clip/"] = (model.clip.config.to_dict(), model.clip)
    with export_to(folder) as out:
        for where, (described_by, part) in parts.items():
            out.tensors(f"{where}{convert.WEIGHTS[0]}", part.state_dict())
            out.json(f"{where}config.json", described_by)
        if not model.config.tokenizer:
            out.tokenizer("tokenizer", model.tokenizer)
        return out.done()


def trained(model: "ShowO") -> nn.ModuleDict:
    """The parts that Show-o's weight file holds, under their published names."""
    names = ("showo", "mm_projector") if model.uses_clip else ("showo",)
    return nn.ModuleDict({name: getattr(model, name) for name in names})


def described(model: "ShowO") -> dict[str, tuple]:
    """config.json as Show-o writes it: key -> (value, the recipe keys it comes from)."""
    v = model.vocabulary
    return {
        "codebook_size": (v.codes, "model.codec with its sizes"),
        "llm_vocab_size": (v.offset - len(prompt.SPECIAL_TOKENS), "model.tokenizer"),
        "mask_token_id": (v.mask, "model.tokenizer with the codebook"),
        "num_vq_tokens": (model.image_tokens, "model.image_size with the codec's sizes"),
        "vocab_size": (v.size, "model.tokenizer with the codebook"),
        "w_clip_vit": (model.uses_clip, "model.understanding"),
    }


def load_tokenizer(config: ShowOConfig, folder: Path | None) -> PreTrainedTokenizerBase:
    """The text tokenizer with Show-o's tokens behind its own, in the order that fixes their ids."""
    if config.tokenizer:
        source = fetch(config.tokenizer, TOKENIZER, "model.tokenizer")
    else:
        source = folder and beside(folder) / "tokenizer"
    if source is None:
        tokenizer = word_tokenizer([*config.words, *prompt.WORDS], [prompt.END_OF_TEXT])
    elif source.is_dir():
        tokenizer = read_tokenizer(source)
    else:
        raise ValueError(f"there is no tokenizer at {source.absolute()}; give model.tokenizer=microsoft/phi-1_5")
    new = [token for token in prompt.SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if 0 < len(new) < len(prompt.SPECIAL_TOKENS):
        raise ValueError(f"the tokenizer of {source} has some of Show-o's tokens but lacks {', '.join(new)}")
    tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def _part_source(given: str | None, folder: Path | None, part: str) -> Path | None:
    """Where a frozen part comes from; None: it stays random."""
    if given:
        return fetch(given, HUB, f"model.{part}_weights")
    if folder is None:
        return None
    if not (source := beside(folder) / part).is_dir():
        raise ValueError(f"{beside(folder).absolute()} has no folder {part!r} inside; give model.{part}_weights")
    return source
