"""Show-o's weights: load published folders or initialise at random, and export.

Parameter names here are the published ones, except that transformers 5 renamed CLIP's.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.io.files import lost_links
from reca.io.paths import is_dir, is_file
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch, fetch_tokenizer
from reca.models.common.pooled_features import assign_weights
from reca.models.common.published_json import check_json
from reca.models.common.text import read_tokenizer
from reca.models.common.tiny_tokenizer import UNKNOWN, word_tokenizer
from reca.models.common.weight_files import assign_state_dict, cast_parameters, init_on_meta, init_random, read_tensors
from reca.models.show_o import prompt
from reca.models.show_o.config import ShowOConfig
from reca.models.show_o.modules import Network

N = TypeVar("N", bound=Network)

PHI_TOKENS = 50295  # tokens of Phi-1.5's tokenizer, before Show-o's are added
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WEIGHTS = ["*.json", "*.safetensors", "*.bin"]
# recipe key -> glob patterns of the files to download
DOWNLOADS = {"weights": _WEIGHTS, "codec_weights": _WEIGHTS, "clip_weights": _WEIGHTS, "tokenizer": TOKENIZER}
# written by Show-o's authors, by the release's trainer, and in other hub repositories
FILES = ("pytorch_model.safetensors", "pytorch_model.bin", "model.safetensors")
TRAINER = "unwrapped_model"  # subfolder of the release's checkpoints that has the model


def load(cls: type[N], config: ShowOConfig) -> N:
    """Build the model on the CPU. Parts without a source are random if `config.weights` is None, else an error.

    Raises ValueError for files that do not fit the recipe, listing missing, unexpected and misshapen tensors.
    """
    folder = fetch(config.weights, DOWNLOADS["weights"]) if config.weights else None
    tokenizer = load_tokenizer(config)
    if folder is None:
        with init_random(config.seed):
            net = cls(config, tokenizer)
        cast_parameters(published_parts(net), lambda _: DTYPES[config.dtype])
    else:
        with init_on_meta():
            net = cls(config, tokenizer)
        for inner in (folder, folder / TRAINER):
            check_json(inner / "config.json", described(net))
        assign_state_dict(published_parts(net), read(folder), str(folder), DTYPES[config.dtype])
    if source := _part_source(config.codec_weights, folder, "codec"):
        assign_state_dict(net.codec, read(source), str(source), torch.float32)
    if net.uses_clip and (source := _part_source(config.clip_weights, folder, "clip")):
        tower = clip_tower(read(source), config.clip.num_hidden_layers - 1)
        assign_state_dict(net.clip, tower, str(source), torch.float32)
    if net.uses_efficientnet:
        if config.efficientnet_weights:
            assign_weights(net.efficientnet, config.efficientnet_weights)
        elif source := _part_source(None, folder, "efficientnet"):
            assign_state_dict(net.efficientnet, read(source), str(source), torch.float32)
    return net


def build_meta(cls: type[N], config: ShowOConfig, tokenizer: PreTrainedTokenizerBase | None) -> N:
    """Build the model that `load` builds, without reading weights. A local tokenizer is read for its size."""
    net = cls(config, tokenizer or _tokenizer_of_its_size(config))
    cast_parameters(published_parts(net), lambda _: DTYPES[config.dtype])
    return net


def export(net: Network, folder: Path) -> list[str]:
    """Write the published files, and frozen parts without a published source into subfolders."""
    config = {
        "_class_name": "Showo",
        "_diffusers_version": "0.30.1",
        **{key: value for key, value, _ in described(net)},
        "llm_model_path": "microsoft/phi-1_5",
        "load_from_showo": True,
    }
    parts: dict[str, tuple[dict[str, Any], nn.Module]] = {"": (config, published_parts(net))}
    if not net.config.codec_weights:
        parts["codec/"] = ({}, net.codec)
    if net.uses_clip and not net.config.clip_weights:
        parts["clip/"] = (net.clip.config.to_dict(), net.clip)
    if net.uses_efficientnet and not net.config.efficientnet_weights:
        parts["efficientnet/"] = ({}, net.efficientnet)
    with export_to(folder) as out:
        for where, (described_by, part) in parts.items():
            out.tensors(f"{where}{FILES[0]}", part.state_dict())
            out.json(f"{where}config.json", described_by)
        if not net.config.tokenizer:
            out.tokenizer("tokenizer", net.tokenizer)
        return out.done()


def loading(config: ShowOConfig) -> str:
    """Return the model card's sentence on how Show-o's own code loads an export."""
    return (
        "[Show-o's code](https://github.com/showlab/Show-o) loads this folder with `Showo.from_pretrained(FOLDER)`; in "
        "its scripts that is `model.showo.pretrained_model_path=FOLDER`."
    )


def published_parts(net: Network) -> nn.ModuleDict:
    """Return the modules of Show-o's weight file, under their published names."""
    names = ("showo", "mm_projector") if hasattr(net, "mm_projector") else ("showo",)
    return nn.ModuleDict({name: getattr(net, name) for name in names})


def described(net: Network) -> list[tuple[str, Any, str]]:
    """Return the entries of Show-o's config.json: key, value, recipe keys that determine it."""
    v = net.vocabulary
    return [
        ("codebook_size", v.codes, "model.codec with its sizes"),
        ("llm_vocab_size", v.offset - len(prompt.SPECIAL_TOKENS), "model.tokenizer"),
        ("mask_token_id", v.mask, "model.tokenizer with the codebook"),
        ("num_vq_tokens", net.image_tokens, "model.image_size with the codec's sizes"),
        ("vocab_size", v.size, "model.tokenizer with the codebook"),
        ("w_clip_vit", net.uses_clip, "model.understanding"),
    ]


def load_tokenizer(config: ShowOConfig, local: bool = False) -> PreTrainedTokenizerBase:
    """Load the text tokenizer and append Show-o's tokens, whose order determines their ids."""
    source = fetch_tokenizer(config, DOWNLOADS, local)
    if source is not None and not config.tokenizer:
        source /= "tokenizer"
    if source is None:
        tokenizer = word_tokenizer([*config.words, *prompt.WORDS], [prompt.END_OF_TEXT])
    elif is_dir(source):
        tokenizer = read_tokenizer(source)
    else:
        raise ValueError(f"there is no tokenizer at {source.absolute()}; set model.tokenizer=microsoft/phi-1_5")
    new = [token for token in prompt.SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if 0 < len(new) < len(prompt.SPECIAL_TOKENS):
        raise ValueError(
            f"the tokenizer of {source} has some of Show-o's tokens but lacks {', '.join(new)}; set model.tokenizer"
        )
    tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def _tokenizer_of_its_size(config: ShowOConfig) -> PreTrainedTokenizerBase:
    """Load a local tokenizer, or build one with as many tokens as Phi-1.5's in place of one on the hub."""
    folder = Path(config.weights).expanduser() if config.weights else None
    own = Path(config.tokenizer).expanduser() if config.tokenizer else folder and beside(folder) / "tokenizer"
    if own and not is_dir(own):
        words = [f"word{i}" for i in range(PHI_TOKENS - len((UNKNOWN, *prompt.WORDS, prompt.END_OF_TEXT)))]
        config = replace(config, weights=None, tokenizer=None, words=words)
    return load_tokenizer(config)


def _part_source(given: str | None, folder: Path | None, part: str) -> Path | None:
    """Return the file or folder of a frozen part; None: it is random."""
    if given:
        return fetch(given, DOWNLOADS[f"{part}_weights"], f"model.{part}_weights")
    if folder is None:
        return None
    if not is_dir(source := beside(folder) / part):
        raise ValueError(f"{beside(folder).absolute()} has no subfolder {part!r}; set model.{part}_weights")
    return source


# published folders <-> our modules


def read(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a published folder or a weight file. Raises ValueError if the folder has no weight file."""
    if is_file(folder):
        return read_tensors(folder)
    for inner in (folder, folder / TRAINER):
        for name in FILES:
            if is_file(inner / name):
                return read_tensors(inner / name)
            if is_file(inner / f"{name}.index.json"):
                return read_tensors(inner / f"{name}.index.json")
    raise ValueError(f"{folder} contains none of {', '.join(FILES)}; pass the folder of a published checkpoint"
                     f"{lost_links(folder)}")  # fmt: skip


def clip_tower(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Select the first `layers` layers of CLIP's vision tower, with the names of transformers 5.

    Accepts files of transformers 4 (prefix `vision_model.`) and 5, with or without the text tower.
    """
    prefix, kept = "vision_model.", {}
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    for name, tensor in (inner or state).items():
        layer = name.removeprefix("encoder.layers.").split(".")[0] if name.startswith("encoder.layers.") else "0"
        if int(layer) < layers and not name.startswith("post_layernorm.") and name != "embeddings.position_ids":
            kept[name] = tensor
    return kept
