"""Janus-Pro's weights: load published files or initialise at random, and export.

Parameter names here are DeepSeek's. transformers' layout has other names, splits qkv, and lacks unused tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.io.paths import is_file
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch, fetch_tokenizer
from reca.models.common.text import check_tokenizer, read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, cast_parameters, init_on_meta, init_random, read_tensors
from reca.models.janus import prompt
from reca.models.janus.config import JanusConfig
from reca.models.janus.modules import Network
from reca.models.janus.published import check_config, deepseek_files, transformers_files

N = TypeVar("N", bound=Network)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# recipe key -> glob patterns of the files to download
DOWNLOADS = {"weights": ["*.json", "*.safetensors", "*.bin"], "tokenizer": TOKENIZER}
TRAINED = ("language_model.", "gen_embed.", "gen_aligner.", "gen_head.")  # parts in model.dtype; the others are fp32
CODEBOOK = "gen_vision_model.quantize.embedding.weight"
QKV = re.compile(r"(vision_model\.vision_tower\.blocks\.\d+\.attn)\.qkv\.(weight|bias)")
POSITIONS = "vision_model.vision_tower.pos_embed"  # [1, n, C]; [n, C] in transformers
DROPPED = re.compile(r"vision_model\.vision_tower\.attn_pool\..*|gen_vision_model\.quantize\.codebook_used")
# DeepSeek's names -> transformers'. The first matching pattern applies.
_NAMES = [
    (r"^vision_model\.vision_tower\.pos_embed$", "model.vision_model.embeddings.position_embedding.weight"),
    (r"^vision_model\.vision_tower\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.vision_tower\.norm\.", "model.vision_model.post_layernorm."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.norm(\d)\.", r"model.vision_model.encoder.layers.\1.layer_norm\2."),
    (
        r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.",
        r"model.vision_model.encoder.layers.\1.self_attn.projection_layer.",
    ),
    (
        r"^vision_model\.vision_tower\.blocks\.(\d+)\.attn\.(q|k|v)\.",
        r"model.vision_model.encoder.layers.\1.self_attn.\2_proj.",
    ),
    (r"^vision_model\.vision_tower\.blocks\.", "model.vision_model.encoder.layers."),
    (r"^aligner\.layers\.0\.", "model.aligner.fc1."),
    (r"^aligner\.layers\.2\.", "model.aligner.hidden_layers.0."),
    (r"^gen_aligner\.layers\.0\.", "model.generation_aligner.fc1."),
    (r"^gen_aligner\.layers\.2\.", "model.generation_aligner.hidden_layers.0."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.", r"model.vqmodel.encoder.down.\1.block."),
    (r"^gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.", r"model.vqmodel.decoder.up.\1.block."),
    (r"^gen_vision_model\.encoder\.conv_blocks\.", "model.vqmodel.encoder.down."),
    (r"^gen_vision_model\.decoder\.conv_blocks\.", "model.vqmodel.decoder.up."),
    (r"^gen_vision_model\.(encoder|decoder)\.mid\.0\.", r"model.vqmodel.\1.mid.block_1."),
    (r"^gen_vision_model\.(encoder|decoder)\.mid\.1\.", r"model.vqmodel.\1.mid.attn_1."),
    (r"^gen_vision_model\.(encoder|decoder)\.mid\.2\.", r"model.vqmodel.\1.mid.block_2."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
]  # fmt: skip


def load(cls: type[N], config: JanusConfig) -> N:
    """Build the model on the CPU, from files or, if `config.weights` is None, with random weights.

    Raises ValueError for files that do not fit the recipe, listing missing, unexpected and misshapen tensors.
    """
    source = fetch(config.weights, DOWNLOADS["weights"]) if config.weights else None
    tokenizer = load_tokenizer(config)
    if source is None:
        with init_random(config.seed):
            net = cls(config, tokenizer)
        return cast_parameters(net, lambda name: kept_dtype(config, name))
    with init_on_meta():
        net = cls(config, tokenizer)
    check_config(beside(source), config)
    assign_published(net, read_tensors(source), str(source))
    return net


def assign_published(net: Network, state: Mapping[str, Tensor], source: str) -> None:
    """Assign the tensors of a published file, in either layout, to the model."""
    if any(name.startswith("model.") for name in state):
        state = from_transformers(state, net.state_dict())
    assign_state_dict(net, state, source, lambda name: kept_dtype(net.config, name))


def kept_dtype(config: JanusConfig, name: str) -> torch.dtype:
    """Return the dtype of a parameter."""
    return DTYPES[config.dtype] if name.startswith(TRAINED) else torch.float32


def build_meta(cls: type[N], config: JanusConfig, tokenizer: PreTrainedTokenizerBase | None) -> N:
    """Build the model that `load` builds, without reading weights."""
    net = cls(config, tokenizer or load_tokenizer(replace(config, weights=None, tokenizer=None)))
    return cast_parameters(net, lambda name: kept_dtype(config, name))


@dataclass(frozen=True)
class TokenizerNeeds:
    """A model's requirements on its tokenizer.

    tokens     control tokens
    words      words that prompts add to the user's text
    model      display name of the model
    example    hub id of a suitable tokenizer
    downloads  recipe key -> glob patterns of the files to download
    """

    tokens: tuple[str, ...] = prompt.SPECIAL_TOKENS
    words: tuple[str, ...] = prompt.WORDS
    model: str = "Janus-Pro"
    example: str = "deepseek-ai/Janus-Pro-1B"
    downloads: Mapping[str, list[str]] = field(default_factory=lambda: DOWNLOADS)


def load_tokenizer(
    config: Any, local: bool = False, needs: TokenizerNeeds = TokenizerNeeds()
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or build a word tokenizer for a random model.

    The published tokenizer is a byte-level BPE whose files name Llama's class, which some versions of transformers
    rebuild with Llama's own rules. Its tokenizer.json is therefore loaded unchanged. Raises ValueError if there is no
    tokenizer.json, if control tokens are missing, or if it has too many tokens.
    """
    source = fetch_tokenizer(config, needs.downloads, local)
    if source is not None:
        if not is_file(source / "tokenizer.json"):
            raise ValueError(
                f"{source.absolute()} contains no tokenizer.json; set model.tokenizer, such as "
                f"model.tokenizer={needs.example}"
            )
        tokenizer = read_tokenizer(source, as_is=True)
    else:
        tokenizer = word_tokenizer([*config.words, *needs.words], needs.tokens)
    check_tokenizer(tokenizer, needs.tokens, config.language.vocab_size, needs.model)
    return tokenizer


# DeepSeek's layout <-> transformers'


def transformers_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name, hit = re.subn(pattern, replacement, name)
        if hit:
            break
    return name


def transformers_names(name: str) -> list[str]:
    """Return a tensor's names in transformers' layout: three for qkv, none for tensors that it lacks."""
    if DROPPED.fullmatch(name):
        return []
    if match := QKV.fullmatch(name):
        return [transformers_name(f"{match[1]}.{part}.{match[2]}") for part in "qkv"]
    return [transformers_name(name)]


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert to transformers' layout.

    transformers' VQ encoder does not normalise codebook entries before comparison, so they are normalised here, which
    gives DeepSeek's codes. Its decoder normalises them anyway.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = transformers_names(name)
        if name == CODEBOOK:
            tensor = F.normalize(tensor.float(), dim=-1).to(tensor.dtype)
        if name == POSITIONS:
            tensor = tensor.squeeze(0)
        made |= dict(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor] * len(names), strict=True))
    return made


def from_transformers(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert from transformers' layout to the names of `wanted`. Unused tensors, which that layout lacks, are 0.

    Unknown names are kept, so that loading reports them.
    """
    made, left = {}, dict(state)
    for name, tensor in wanted.items():
        names = transformers_names(name)
        if not names:
            made[name] = torch.zeros(tensor.shape, dtype=torch.float32)
        elif all(part in state for part in names):
            parts = [left.pop(part) for part in names]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            made[name] = whole[None] if name == POSITIONS and whole.ndim == 2 else whole
    return made | left


def loading(config: JanusConfig) -> str:
    """Return the model card's sentence on how DeepSeek's code or transformers loads an export."""
    if config.export_layout == "transformers":
        return "`transformers.JanusForConditionalGeneration.from_pretrained(FOLDER)` loads this folder."
    return (
        "[DeepSeek's code](https://github.com/deepseek-ai/Janus) loads this folder with "
        "`AutoModelForCausalLM.from_pretrained(FOLDER)` after `import janus.models`."
    )


def export(net: Network, folder: Path) -> list[str]:
    """Write a folder in the layout of model.export_layout. Raises ValueError if the layout cannot express the model."""
    with export_to(folder) as out:
        if net.config.export_layout == "deepseek":
            out.pickled("pytorch_model.bin", net.state_dict())
            files = deepseek_files(net.config)
        else:
            files = transformers_files(net.config, net.vocabulary)
            out.tensors("model.safetensors", to_transformers(net.state_dict()))
        for name, content in files.items():
            out.json(name, content)
        out.tokenizer(".", net.tokenizer)
        return out.done()
