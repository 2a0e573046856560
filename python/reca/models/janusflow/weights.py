"""JanusFlow's weights: load published files or initialise at random, and export.

Parameter names here are DeepSeek's. SDXL's autoencoder is published separately, in diffusers' layout.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.io.files import read_json
from reca.io.paths import is_dir, is_file
from reca.models.common.exporting import export_to
from reca.models.common.hub import TOKENIZER, beside, fetch
from reca.models.common.kl_codec import KlCodec
from reca.models.common.ldm_autoencoder import renew_attention
from reca.models.common.published_json import check_json
from reca.models.common.weight_files import assign_state_dict, cast_parameters, init_on_meta, init_random, read_tensors
from reca.models.janus import weights as janus
from reca.models.janus.published import HALF, LANGUAGE, PREPROCESSOR, language_file, part, processor_files, tower
from reca.models.janus.weights import DTYPES, TokenizerNeeds
from reca.models.janusflow import prompt
from reca.models.janusflow.config import JanusFlowConfig
from reca.models.janusflow.modules import PATCH, Network

N = TypeVar("N", bound=Network)
log = logging.getLogger("reca")

CODEC = "diffusion_pytorch_model.safetensors"
CODEC_FOLDER = "vae"  # subfolder of an export
# recipe key -> glob patterns of the files to download
DOWNLOADS = {
    "weights": ["*.json", "*.safetensors"],
    "codec_weights": ["config.json", CODEC],
    "tokenizer": TOKENIZER,
}
TRAINED = ("language_model.", "vision_gen_")  # parts in model.dtype; the others are fp32
NEEDS = TokenizerNeeds(prompt.SPECIAL_TOKENS, prompt.WORDS, "JanusFlow", "deepseek-ai/JanusFlow-1.3B", DOWNLOADS)


def load(cls: type[N], config: JanusFlowConfig) -> N:
    """Build the model on the CPU, from files or, if `config.weights` is None, with random weights.

    Raises ValueError for files that do not fit the recipe, listing missing, unexpected and misshapen tensors.
    """
    source = fetch(config.weights, DOWNLOADS["weights"]) if config.weights else None
    tokenizer = load_tokenizer(config)
    if source is None:
        if config.codec_weights:
            raise ValueError("model.codec_weights needs model.weights, which is null; set both or neither")
        with init_random(config.seed):
            net = cls(config, tokenizer)
        return cast_parameters(net, lambda name: kept_dtype(config, name))
    with init_on_meta():
        net = cls(config, tokenizer)
    check_files(beside(source), config)
    given = config.codec_weights
    folder = fetch(given, DOWNLOADS["codec_weights"], "model.codec_weights") if given else beside(source)
    assign_published(net, read_tensors(source), read_codec(config, folder), str(source))
    return net


def assign_published(net: Network, state: Mapping[str, Tensor], codec: Mapping[str, Tensor], source: str) -> None:
    """Assign the tensors of DeepSeek's file and of the codec's file to the model."""
    prefix = codec_prefix(net)
    whole = {**state, **{f"{prefix}{name}": tensor for name, tensor in renew_attention(codec).items()}}
    assign_state_dict(net, whole, source, lambda name: kept_dtype(net.config, name))


def codec_prefix(net: Network) -> str:
    """Return the prefix of the codec's parameter names."""
    return "codec.autoencoder." if isinstance(net.codec, KlCodec) else "codec."


def read_codec(config: JanusFlowConfig, source: Path) -> dict[str, Tensor]:
    """Read the codec's tensors from its folder, or from its subfolder of an export."""
    folder = source / CODEC_FOLDER if is_dir(source / CODEC_FOLDER) else source
    if not is_file(folder / CODEC):
        raise ValueError(
            f"{folder.absolute()} contains no {CODEC}; set model.codec_weights, such as "
            "model.codec_weights=stabilityai/sdxl-vae"
        )
    if config.codec == "sdxl":
        rows = vars(config.autoencoder).items()
        check_json(folder / "config.json", [(key, value, f"model.autoencoder.{key}") for key, value in rows])
    return read_tensors(folder / CODEC)


def kept_dtype(config: JanusFlowConfig, name: str) -> torch.dtype:
    """Return the dtype of a parameter."""
    return DTYPES[config.dtype] if name.startswith(TRAINED) else torch.float32


def load_tokenizer(config: JanusFlowConfig, local: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer as Janus-Pro's, with JanusFlow's control tokens."""
    return janus.load_tokenizer(config, local, NEEDS)


def build_meta(cls: type[N], config: JanusFlowConfig, tokenizer: PreTrainedTokenizerBase | None) -> N:
    """Build the model that `load` builds, without reading weights."""
    net = cls(config, tokenizer or load_tokenizer(replace(config, weights=None, tokenizer=None)))
    return cast_parameters(net, lambda name: kept_dtype(config, name))


# the JSON files of a published folder


def check_files(folder: Path, config: JanusFlowConfig) -> None:
    """Raise ValueError if the config.json of a published folder contradicts the recipe.

    Different preprocessing of pixels is only logged, since the published preprocessor_config.json was not available.
    """
    path, preprocessor = folder / "config.json", folder / PREPROCESSOR
    check_json(path, described(config))
    found = read_json(path) if is_file(path) else {}
    tower_says = (found.get("vision_und_enc_config") or {}).get("params") or {}
    warn_of_pixels(path, tower_says, {"pixel_mean": HALF, "pixel_std": HALF})
    if is_file(preprocessor):
        wanted = {"image_mean": HALF, "image_std": HALF, "background_color": [127, 127, 127]}
        if "pixel_mean" not in tower_says:
            wanted["do_normalize"] = True
        warn_of_pixels(preprocessor, read_json(preprocessor), wanted)


def warn_of_pixels(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Warn of preprocessing values in a published file that differ from those used here."""
    for key, value in wanted.items():
        if found.get(key) not in (None, value):
            log.warning(
                "%s has %s %s, but %s is used here: h_v and answers will differ from those of DeepSeek's code",
                path, key, found[key], value,
            )  # fmt: skip


def described(config: JanusFlowConfig) -> list[tuple[str, Any, str]]:
    """Return the sizes as tuples (path in config.json, value, recipe key)."""
    language, sizes, channels = config.language, config.generation, latent_channels(config)
    encoder, decoder = "vision_gen_enc_config.params", "vision_gen_dec_config.params"
    rows = [(f"language_config.{key}", getattr(language, key), f"model.language.{key}") for key in LANGUAGE]
    for place, name, blocks in (
        (encoder, "input_channels", "encoder_blocks"),
        (decoder, "out_channels", "decoder_blocks"),
    ):
        rows += [
            (f"{place}.hidden_size", language.hidden_size, "model.language.hidden_size"),
            (f"{place}.block_out_channels", [sizes.width], "model.generation.width"),
            (f"{place}.layers_in_middle", getattr(sizes, blocks), f"model.generation.{blocks}"),
            (f"{place}.norm_eps", sizes.norm_eps, "model.generation.norm_eps"),
            (f"{place}.{name}", *channels),
        ]
    size = config.vision.image_size
    return [*rows, ("vision_und_enc_config.params.image_size", size, "model.vision.image_size")]


def latent_channels(config: JanusFlowConfig) -> tuple[int, str]:
    """Return the channels of a latent, and the recipe key that sets them."""
    if config.codec == "sdxl":
        return config.autoencoder.latent_channels, "model.autoencoder.latent_channels"
    return config.patches.channels, "model.patches.channels"


def published_files(config: JanusFlowConfig) -> dict[str, dict]:
    """Return the JSON files that the package `janus.janusflow` reads besides weights and tokenizer."""
    language, sizes, (channels, _) = config.language, config.generation, latent_channels(config)
    both = {"block_out_channels": [sizes.width], "hidden_size": language.hidden_size, "norm_eps": sizes.norm_eps,
            "use_bias": True, "use_mid_block": True}  # fmt: skip
    return {
        "config.json": {
            "model_type": "multi_modality",
            "architectures": ["MultiModalityCausalLM"],
            "vision_und_enc_config": part(
                "vision_und_enc", "CLIPVisionTower", select_feature="same", select_layer=-1, **tower(config.vision)
            ),
            "vision_gen_enc_config": part(
                "vision_gen_enc", "ShallowUViTEncoder", input_channels=channels, kernel_size=PATCH, stride=PATCH,
                padding=0, layers_in_middle=sizes.encoder_blocks, **both,
            ),
            "vision_gen_dec_config": part(
                "vision_gen_dec", "ShallowUViTDecoder", in_channels=sizes.width, out_channels=channels, upsamples=1,
                layers_in_middle=sizes.decoder_blocks, **both,
            ),
            "language_config": language_file(language, config.dtype),
        },
        **processor_files(config.vision),
    }  # fmt: skip


def loading(config: JanusFlowConfig) -> str:
    """Return the model card's sentence on how DeepSeek's code loads an export."""
    return (
        "[DeepSeek's code](https://github.com/deepseek-ai/Janus) loads this folder with "
        "`janus.janusflow.models.MultiModalityCausalLM.from_pretrained(FOLDER)`, and generates images with "
        + ("[SDXL's autoencoder](https://huggingface.co/stabilityai/sdxl-vae)." if config.codec_weights else
           f"the autoencoder in its folder `{CODEC_FOLDER}`.")
    )  # fmt: skip


def export(net: Network, folder: Path) -> list[str]:
    """Write a folder in the published format, and a codec without a published source into a subfolder."""
    prefix, state = codec_prefix(net), net.state_dict()
    with export_to(folder) as out:
        out.tensors("model.safetensors", {n: t for n, t in state.items() if not n.startswith("codec.")})
        for name, content in published_files(net.config).items():
            out.json(name, content)
        if not net.config.codec_weights:
            codec = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith("codec.")}
            out.tensors(f"{CODEC_FOLDER}/{CODEC}", codec)
            if isinstance(net.codec, KlCodec):
                out.json(f"{CODEC_FOLDER}/config.json", net.codec.public_config())
        out.tokenizer(".", net.tokenizer)
        return out.done()
