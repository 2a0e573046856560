"""BAGEL's weights: load published files or initialise at random, and export.

Parameter names here are those of the main file. The autoencoder's file has LDM's names, the module diffusers'.
"""

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.io.files import lost_links
from reca.io.paths import is_dir, is_file
from reca.models.bagel import prompt
from reca.models.bagel.config import BagelConfig
from reca.models.bagel.modules import Network, PositionTable, role
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch, fetch_tokenizer
from reca.models.common.kl_codec import KlCodec
from reca.models.common.ldm_autoencoder import to_diffusers, to_ldm
from reca.models.common.published_json import check_json
from reca.models.common.text import check_tokenizer, read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import (
    INDEX,
    assign_state_dict,
    cast_parameters,
    init_on_meta,
    init_random,
    read_tensors,
    weight_map,
)

T = TypeVar("T", bound=Network)

# modules in the main file, under their published names
PARTS = (
    "language_model", "time_embedder", "vae2llm", "llm2vae", "latent_pos_embed", "vit_pos_embed", "connector",
    "vit_model",
)  # fmt: skip
TRAINED = frozenset({"gen_lm", "gen_head"})  # roles that RECA trains
PUBLISHED = "ema.safetensors"
# names of the main file: in BAGEL's repository, from the release's trainer, in RECA's repository
SINGLE = (PUBLISHED, "model.safetensors", "model_bf16.safetensors")
INDICES = tuple(f"{name}{INDEX}" for name in SINGLE)
CODEC = "ae.safetensors"
_WEIGHTS = ["*.safetensors", "*.json", "*.txt"]
# recipe key -> glob patterns of the files to download
DOWNLOADS = {"weights": _WEIGHTS, "overlay": _WEIGHTS, "codec_weights": _WEIGHTS, "tokenizer": TOKENIZER}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def load(cls: type[T], config: BagelConfig, device: torch.device | str = "cpu") -> T:
    """Build the model from published files or, if `config.weights` is None, with random weights.

    Raises ValueError for files that do not fit the recipe, listing missing, unexpected and misshapen tensors.
    """
    if config.weights is None:
        if config.overlay or config.codec_weights:
            raise ValueError("model.overlay and model.codec_weights need model.weights, which is null; set it")
        with init_random(config.seed, device):
            return to_kept_types(cls(config, load_tokenizer(config))).to(device)
    source = fetch(config.weights, DOWNLOADS["weights"])
    folder = beside(source)
    check_sizes(folder, config)
    with init_on_meta():
        model = cls(config, load_tokenizer(config))
    state = read(source)
    if config.overlay:
        state |= read(fetch(config.overlay, DOWNLOADS["overlay"], "model.overlay"))
    assign_state_dict(published_parts(model), state, str(source), lambda name: kept_dtype(config, name))
    for table in model.modules():
        if isinstance(table, PositionTable):
            table.pos_embed = table.table()
    codec = config.codec_weights
    _load_codec(model.codec, fetch(codec, DOWNLOADS["codec_weights"], "model.codec_weights") if codec else folder)
    return model.to(device)


def export(net: Network, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write all files of a folder in the published format, including the frozen parts, and return their names."""
    codec = net.codec.state_dict()
    if isinstance(net.codec, KlCodec):
        codec = to_ldm(net.codec.autoencoder.state_dict(), len(net.codec.sizes.block_out_channels))
    with export_to(folder) as out:
        out.tensors(PUBLISHED, {n: t.to(dtype) for n, t in published_parts(net).state_dict().items()})
        out.tensors(CODEC, codec)
        for name, content in published_configs(net.config, net.vocabulary.bos, net.vocabulary.eos).items():
            out.json(name, content)
        out.tokenizer(".", net.tokenizer)
        return out.done()


def loading(config: BagelConfig) -> str:
    """Return the model card's sentence on how BAGEL's own code loads an export."""
    return (
        "[BAGEL's code](https://github.com/ByteDance-Seed/Bagel) loads this folder like BAGEL-7B-MoT: "
        "`python app.py --model_path FOLDER`. The weight file is named `ema.safetensors`, like the published one."
    )


def published_parts(net: Network) -> nn.ModuleDict:
    """Return the modules of the main file, under their published names."""
    return nn.ModuleDict({name: getattr(net, name) for name in PARTS})


def to_kept_types(net: T) -> T:
    """Cast parameters to the dtypes of `kept_dtype`."""
    return cast_parameters(net, lambda name: kept_dtype(net.config, name))


def kept_dtype(config: BagelConfig, name: str) -> torch.dtype:
    """Return the dtype of a parameter."""
    part = role(name)
    if part == "codec" or config.dtype == "fp32" or (config.dtype == "mixed" and part in TRAINED):
        return torch.float32
    return torch.bfloat16


def load_tokenizer(config: BagelConfig, local: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe or of the weights, or build a word tokenizer for a random model.

    Raises ValueError if there is none, or if it lacks control tokens or has ids beyond the embedding table.
    """
    source = fetch_tokenizer(config, DOWNLOADS, local)
    if source is None:
        tokenizer = word_tokenizer(config.words, prompt.SPECIAL_TOKENS)
    elif any(is_file(source / name) for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(source)
    else:
        raise ValueError(
            f"{source.absolute()} contains no tokenizer ({', '.join(TOKENIZER_FILES)}); set model.tokenizer, such as "
            "model.tokenizer=ByteDance-Seed/BAGEL-7B-MoT"
        )
    check_tokenizer(tokenizer, prompt.SPECIAL_TOKENS, config.language.vocab_size, "BAGEL")
    return tokenizer


def read(source: Path) -> dict[str, Tensor]:
    """Read a weight file, or that of a folder. Raises ValueError if the folder has none or several.

    An index of a single weight file does not count as another one: BAGEL's repository has one for ema.safetensors.
    """
    if is_file(source):
        return read_tensors(source)
    found = [name for name in SINGLE if is_file(source / name)]
    indices = [name for name in INDICES if is_file(source / name)]
    found += [name for name in indices if not set(found) & set(weight_map(source / name).values())]
    if len(found) != 1:
        known = ", ".join((*SINGLE, *INDICES))
        what = f"{' and '.join(found)}; name the file to read" if found else f"none of {known}{lost_links(source)}"
        raise ValueError(f"{source} contains {what}")
    return read_tensors(source / found[0])


def check_sizes(folder: Path, config: BagelConfig) -> None:
    """Raise ValueError if llm_config.json or vit_config.json of the weights contradicts the recipe."""
    for file, section in (("llm_config.json", "language"), ("vit_config.json", "vision")):
        sizes = vars(getattr(config, section)).items()
        check_json(folder / file, [(key, value, f"model.{section}.{key}") for key, value in sizes])


def published_configs(config: BagelConfig, bos: int, eos: int) -> dict[str, dict]:
    """Return the JSON files from which the public inference code reads sizes."""
    language, vision = config.language, config.vision
    return {
        "config.json": {"name": "BAGEL"},
        "llm_config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "hidden_act": "silu",
            **vars(language),
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "max_window_layers": language.num_hidden_layers,
            "model_type": "qwen2",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
        },
        "vit_config.json": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            **vars(vision),
            "model_type": "siglip_vision_model",
            "num_channels": 3,
        },
    }


def _load_codec(codec: nn.Module, source: Path) -> None:
    path = source / CODEC if is_dir(source) else source
    if not is_file(path):
        raise ValueError(f"{path} does not exist; set model.codec_weights, the FLUX autoencoder published with BAGEL")
    state = read(path)
    if isinstance(codec, KlCodec):
        state = to_diffusers(state, len(codec.sizes.block_out_channels))
        codec = codec.autoencoder
    assign_state_dict(codec, state, str(path), torch.float32)
