"""OpenUni's weights: load published files or initialise at random, and export.

InternVL3, SANA and DC-AE are published separately. OpenUni's own file has the trained parts, with the same names as
here.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from reca.io.files import read_json
from reca.io.paths import is_dir, is_file
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch, fetch_tokenizer
from reca.models.common.pooled_features import assign_weights
from reca.models.common.text import check_tokenizer, read_tokenizer
from reca.models.common.tiny_tokenizer import word_tokenizer
from reca.models.common.weight_files import assign_state_dict, init_on_meta, init_random, read_tensors
from reca.models.open_uni import prompt
from reca.models.open_uni.config import OpenUniConfig
from reca.models.open_uni.modules import Network
from reca.precision import fp32_by_default

log = logging.getLogger("reca")

N = TypeVar("N", bound=Network)

FILE, FROZEN = "open_uni.pth", "frozen.safetensors"
TRAINED = ("meta_queries", "connector.", "projector.", "transformer.")
REQUIRED = ("meta_queries", "connector.", "projector.")
MLLM = "lmm."  # prefix of InternVL3's original names in OpenUni's file
_LANGUAGE = (  # prefixes of the language model: here, and in OpenUni's file
    ("mllm.model.language_model.", "lmm.language_model.model."),
    ("mllm.lm_head.", "lmm.language_model.lm_head."),
)
# files of a single model in diffusers' layout
_DIFFUSERS = ["config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*"]
# recipe key -> glob patterns of the files to download; weights and overlay are one file each
DOWNLOADS = {
    "mllm": ["*.json", "*.safetensors", "*.txt"],
    "dit": [*_DIFFUSERS, *(f"transformer/{name}" for name in _DIFFUSERS)],
    "codec_weights": [*_DIFFUSERS, *(f"vae/{name}" for name in _DIFFUSERS)],
    "tokenizer": TOKENIZER,
}

# InternVL's original names -> transformers' names. qkv is split in three, see _QKV.
_MLLM = [
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.",
        r"model.vision_tower.encoder.layer.\1.attention.projection_layer.",
    ),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm1\.", r"model.vision_tower.encoder.layer.\1.layernorm_before."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm2\.", r"model.vision_tower.encoder.layer.\1.layernorm_after."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.ls1$", r"model.vision_tower.encoder.layer.\1.lambda_1"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.ls2$", r"model.vision_tower.encoder.layer.\1.lambda_2"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"model.vision_tower.encoder.layer.\1.mlp."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^vision_tower\.", "model.vision_tower."),  # as saved by transformers
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
]  # fmt: skip
_QKV = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$")


def load(cls: type[N], config: OpenUniConfig, device: torch.device | str = "cpu") -> N:
    """Build the model from published parts or from an export, or with random weights if no part is given.

    Raises ValueError for files that do not fit the recipe, listing missing, unexpected and misshapen tensors.
    """
    if config.overlay and not config.weights:
        raise ValueError("model.overlay needs model.weights, which is null; set it")
    keys = ("weights", "mllm", "dit", "codec_weights")
    absent = [key for key in keys if getattr(config, key) is None]
    if absent == ["mllm", "dit", "codec_weights"] and (frozen := frozen_beside(config.weights)):
        return _exported(cls, config, frozen).to(device)
    if absent and len(absent) < len(keys):
        raise ValueError(f"model.{absent[0]} is null but other parts are given; set all of {', '.join(keys)}, or none")
    return (_random(cls, config, device) if absent else _published(cls, config)).to(device)


def _exported(cls: type[N], config: OpenUniConfig, frozen: Path) -> N:
    """Build the model of an export, of which `frozen` is a file."""
    with init_on_meta():
        net = cls(config, load_tokenizer(config))
    trained, _ = overlay(own_files(config))
    assign_state_dict(net, read_tensors(frozen) | trained, str(frozen.parent), torch.float32)
    return net


def _random(cls: type[N], config: OpenUniConfig, device: torch.device | str) -> N:
    with init_random(config.seed, device):
        net = cls(config, load_tokenizer(config)).requires_grad_(True)
    if config.understanding == "efficientnet" and config.efficientnet_weights:
        assign_weights(net.mllm.model.vision_tower, config.efficientnet_weights)
    return net


def _published(cls: type[N], config: OpenUniConfig) -> N:
    """Build the model of InternVL3, SANA, DC-AE and OpenUni's own files."""
    for key, published in (("codec", "dc_ae"), ("understanding", "internvit")):
        if getattr(config, key) != published:
            raise ValueError(
                f"model.{key}={getattr(config, key)} is for a random model; published parts need "
                f"model.{key}={published}"
            )
    with init_on_meta():
        net = cls(config, load_tokenizer(config))
    assert config.mllm and config.weights and config.dit and config.codec_weights, "`absent` would name them"
    folder = fetch(config.mllm, DOWNLOADS["mllm"], "model.mllm")
    mllm = mllm_native(read_tensors(folder))
    net.transformer = _diffusers_part(SanaTransformer2DModel, config.dit, "dit", "transformer")
    net.codec = _diffusers_part(AutoencoderDC, config.codec_weights, "codec_weights", "vae")
    state, report = overlay(own_files(config))
    for line in report:
        log.info("OpenUni: %s", line)
    changed = mllm_native({name: tensor for name, tensor in state.items() if name.startswith(MLLM)})
    kept = next(iter(mllm.values())).dtype
    assign_state_dict(net.mllm, mllm | {name: tensor.to(kept) for name, tensor in changed.items()}, str(folder))
    assign_published(net, state, config.weights)
    return net


def own_files(config: OpenUniConfig) -> list[Path]:
    """Return the local paths of weights and overlay."""
    return [fetch(s, key=f"model.{key}") for key in ("weights", "overlay") if (s := getattr(config, key))]


def build_meta(cls: type[N], config: OpenUniConfig, tokenizer: PreTrainedTokenizerBase | None) -> N:
    """Build the model without files, in fp32.

    `load` keeps InternVL3 in the dtype of its files, so that the published one, in bf16, takes half the memory.
    """
    tokenizer = tokenizer or load_tokenizer(replace(config, mllm=None, tokenizer=None))
    return cls(config, tokenizer).requires_grad_(True)


def assign_published(net: Network, state: dict[str, Tensor], source: str) -> None:
    """Assign a published file's tensors to the model, in fp32. SANA is unchanged if the file does not have it."""
    queries = state["meta_queries"]
    if queries.shape != net.meta_queries.shape:
        raise ValueError(f"{source}: meta_queries is {list(queries.shape)}, expected {list(net.meta_queries.shape)}")
    net.meta_queries = nn.Parameter(queries.float())
    for part in ("connector", "projector", "transformer"):
        own = {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}
        if own:
            assign_state_dict(getattr(net, part), own, f"{source} ({part})", torch.float32)


def export(net: Network, folder: Path, changed: Iterable[str] = ()) -> list[str]:
    """Write the trained parts as the .pth that OpenUni's inference code loads, and return the names of the files.

    InternVL3 and a codec without a published source (random, or fitted here) are written to a second file.
    changed: parameters that training has changed; if one is InternVL3's, the .pth also has its language model.
    """
    with export_to(folder) as out:
        language = net.config.mllm is not None and any(name.startswith("mllm.") for name in changed)
        out.pickled(FILE, published_parts(net) | (published_language(net) if language else {}))
        if net.config.mllm is None:
            out.tensors(FROZEN, {n: t for n, t in net.state_dict().items() if not n.startswith(TRAINED)})
        return out.done()


def loading(config: OpenUniConfig) -> str:
    """Return the model card's sentence on how OpenUni's own code loads an export."""
    return (
        "[OpenUni's code](https://github.com/wusize/OpenUni) takes `open_uni.pth` as `--checkpoint` and loads it over "
        "InternVL3, SANA and DC-AE, which it downloads itself."
    )


def published_parts(net: Network) -> dict[str, Tensor]:
    """Return the tensors of OpenUni's own file, under their published names."""
    return {name: tensor for name, tensor in net.state_dict().items() if name.startswith(TRAINED)}


def published_language(net: Network) -> dict[str, Tensor]:
    """Return InternVL3's language model under its names in OpenUni's file."""
    state = net.state_dict().items()
    return {name.replace(own, public): t for own, public in _LANGUAGE for name, t in state if name.startswith(own)}


def frozen_beside(weights: str | None) -> Path | None:
    """Return the file of frozen parts that `export` wrote, if any. weights: its folder, or the .pth in it."""
    if weights is None:
        return None
    path = beside(Path(weights).expanduser()) / FROZEN
    return path if is_file(path) else None


def load_tokenizer(config: OpenUniConfig, local: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe or of InternVL3, or build a word tokenizer for a random model.

    Raises ValueError if it does not fit the model.
    """
    source = fetch_tokenizer(config, DOWNLOADS, local, part="mllm")
    tokenizer = read_tokenizer(source) if source else word_tokenizer(config.words, prompt.SPECIAL_TOKENS)
    check_tokenizer(tokenizer, prompt.SPECIAL_TOKENS, config.language.vocab_size, "OpenUni")
    return tokenizer


def mllm_native(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename InternVL3's tensors from the original names to transformers', unless they have these already."""
    state = {name.removeprefix(MLLM): tensor for name, tensor in state.items()}
    if any(name.startswith("model.") for name in state):
        return state
    native = {}
    for name, tensor in state.items():
        if match := _QKV.match(name):
            layer, kind = match.groups()
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                native[f"model.vision_tower.encoder.layer.{layer}.attention.{part}_proj.{kind}"] = third
            continue
        for pattern, replacement in _MLLM:
            name, hit = re.subn(pattern, replacement, name)
            if hit:
                break
        native[name] = tensor
    return native


def read_parts(path: Path) -> dict[str, Tensor]:
    """Read a published OpenUni file: any of connector.*, projector.*, meta_queries, transformer.* and lmm.*.

    vae.* is ignored. Raises ValueError for any other tensor.
    """
    state = read_tensors(path / FILE if is_file(path / FILE) else path, ignore=(FROZEN,))
    unknown = sorted(n for n in state if not n.startswith((*TRAINED, MLLM, "vae.")))
    if unknown:
        raise ValueError(
            f"{path} is not an OpenUni file: it has {unknown[:5]}; expected names beginning with {', '.join(TRAINED)}"
        )
    return {name: tensor for name, tensor in state.items() if name.startswith((*TRAINED, MLLM))}


def overlay(paths: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """Merge files; tensors of later ones replace those of earlier ones. Returns the tensors and a log line per file."""
    merged: dict[str, Tensor] = {}
    report = []
    for path in paths:
        part = read_parts(path)
        counts = {prefix.rstrip("."): sum(n.startswith(prefix) for n in part) for prefix in (*TRAINED, MLLM)}
        report.append(
            f"{path.name}: " + ", ".join(f"{count} tensors of {name}" for name, count in counts.items() if count)
        )
        merged |= part
    absent = [prefix.rstrip(".") for prefix in REQUIRED if not any(n.startswith(prefix) for n in merged)]
    if absent:
        raise ValueError(
            f"{', '.join(path.name for path in paths)} contains no {', '.join(absent)}; an OpenUni file must have "
            "connector, projector and meta_queries (set model.weights to the base file, model.overlay to a RECA file)"
        )
    return merged, report


@fp32_by_default()
def _diffusers_part(class_: Any, source: str, key: str, part: str) -> nn.Module:
    """Load a diffusers model in fp32 with the sizes of its config.json, from a repository or its subfolder `part`."""
    folder = fetch(source, DOWNLOADS[key], f"model.{key}")
    folder = folder / part if is_dir(folder / part) else folder
    with init_on_meta():
        module = class_.from_config(read_json(folder / "config.json"))
    assign_state_dict(module, read_tensors(folder), str(folder), torch.float32)
    return module
