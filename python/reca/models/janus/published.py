"""JSON files of the two published layouts, from which public code reads sizes, preprocessing and tokens."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaConfig
from transformers import JanusConfig as NativeConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from reca.io.files import read_json
from reca.io.paths import is_file
from reca.models.common.published_json import check_json
from reca.models.janus.config import JanusConfig, LlamaSizes, VisionSizes
from reca.models.janus.prompt import IMAGE, Vocabulary

PREPROCESSOR = "preprocessor_config.json"
HALF = [0.5, 0.5, 0.5]  # mean and standard deviation of pixels in [0, 1]
LANGUAGE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
            "vocab_size", "rms_norm_eps")  # fmt: skip


def check_config(folder: Path, config: JanusConfig) -> None:
    """Raise ValueError if the config.json of a published folder contradicts the recipe."""
    path = folder / "config.json"
    native = is_file(path) and read_json(path).get("model_type") == "janus"
    rows = [(transformers if native else theirs, value, key) for theirs, transformers, value, key in described(config)]
    check_json(path, [(place, value, key) for place, value, key in rows if place is not None])


def described(config: JanusConfig) -> list[tuple[str | None, str | None, Any, str]]:
    """Return the sizes as (path in DeepSeek's config.json, in transformers', value, recipe key); None: not in it."""
    language, vision, vq = config.language, config.vision, config.vq
    rows: list[tuple[str | None, str | None, Any, str]] = [
        (f"language_config.{key}", f"text_config.{key}", getattr(language, key), f"model.language.{key}")
        for key in LANGUAGE
    ]
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "patch_size"):
        rows.append((None, f"vision_config.{key}", getattr(vision, key), f"model.vision.{key}"))
    head = config.head_width or language.hidden_size
    return [
        *rows,
        ("vision_config.params.image_size", "vision_config.image_size", vision.image_size, "model.vision.image_size"),
        ("aligner_config.params.input_dim", None, vision.hidden_size, "model.vision.hidden_size"),
        ("gen_vision_config.params.image_token_size", "vq_config.num_embeddings", *entries(config)),
        ("gen_vision_config.params.n_embed", "vq_config.embed_dim", vq.code_channels, "model.vq.code_channels"),
        (None, "vq_config.base_channels", vq.channels, "model.vq.channels"),
        (None, "vq_config.channel_multiplier", vq.multipliers, "model.vq.multipliers"),
        (None, "vq_config.num_res_blocks", vq.blocks, "model.vq.blocks"),
        (None, "vq_config.latent_channels", vq.z_channels, "model.vq.z_channels"),
        ("gen_head_config.params.image_token_embed", "vq_config.image_token_embed_dim", head, "model.head_width"),
    ]


def entries(config: JanusConfig) -> tuple[int, str]:
    """Return the number of codes, and the recipe key that sets it."""
    if config.codec == "vq":
        return config.vq.entries, "model.vq.entries"
    return config.patches.entries, "model.patches.entries"


def deepseek_files(config: JanusConfig) -> dict[str, dict]:
    """Return the JSON files that the package `janus` reads besides weights and tokenizer."""
    language, width = config.language, config.language.hidden_size
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    codes, _ = entries(config)
    return {
        "config.json": {
            "model_type": "multi_modality",
            "architectures": ["MultiModalityCausalLM"],
            "vision_config": part(
                "vision", "CLIPVisionTower", select_feature="same", select_layer=-1, **tower(config.vision)
            ),
            "aligner_config": part("aligner", "MlpProjector", input_dim=config.vision.hidden_size, **mlp),
            "gen_vision_config": part("gen_vision", "VQ-16", image_token_size=codes, n_embed=config.vq.code_channels),
            "gen_aligner_config": part("gen_aligner", "MlpProjector", input_dim=config.vq.code_channels, **mlp),
            "gen_head_config": part(
                "gen_head",
                "vision_head",
                image_token_embed=config.head_width or width,
                image_token_size=codes,
                n_embed=width,
            ),
            "language_config": language_file(language, config.dtype),
        },
        **processor_files(config.vision),
    }


def part(kind: str, cls: str, **params: Any) -> dict[str, Any]:
    """Return the section of a module in DeepSeek's config.json. cls: its class there."""
    return {"cls": cls, "model_type": kind, "params": params}


def tower(vision: VisionSizes) -> dict[str, Any]:
    """Return the SigLIP entries of DeepSeek's config.json."""
    size = vision.image_size
    return {"image_size": size, "model_name": f"siglip_large_patch{vision.patch_size}_{size}"}


def language_file(language: LlamaSizes, dtype: str) -> dict[str, Any]:
    """Return the language model's section of DeepSeek's config.json."""
    return {
        "model_type": "llama",
        **vars(language),
        "torch_dtype": "bfloat16" if dtype == "bf16" else "float32",
    }


def processor_files(vision: VisionSizes) -> dict[str, dict]:
    """Return the JSON files of DeepSeek's processor."""
    return {
        PREPROCESSOR: {
            "image_processor_type": "VLMImageProcessor",
            "processor_class": "VLChatProcessor",
            "image_size": vision.image_size,
            "min_size": vision.min_side,
            "background_color": [127, 127, 127],
            "do_normalize": True,
            "image_mean": HALF,
            "image_std": HALF,
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
            "image_tag": IMAGE,
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "add_special_token": False,
            "ignore_id": -100,
            "mask_prompt": True,
        },
    }


def transformers_files(config: JanusConfig, v: Vocabulary) -> dict[str, dict]:
    """Return the JSON files that JanusForConditionalGeneration reads besides weights and tokenizer.

    Raises ValueError for a model that its classes do not support.
    """
    language, vision, vq, width = config.language, config.vision, config.vq, config.language.hidden_size
    if config.codec != "vq" or (config.head_width or width) != width:
        raise ValueError(
            "transformers' Janus supports only model.codec=vq and a code head as wide as the language model, not "
            f"model.codec={config.codec} and model.head_width={config.head_width}; set model.export_layout=deepseek"
        )
    tokens = (vision.image_size // vision.patch_size) ** 2
    native = NativeConfig(
        text_config=LlamaConfig(
            **{key: value for key, value in vars(language).items() if key != "rope_theta"},
            rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=v.bos,
            eos_token_id=v.eos,
            pad_token_id=v.pad,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            projection_dim=width,
            num_image_tokens=tokens,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=vq.code_channels,
            num_embeddings=vq.entries,
            latent_channels=vq.z_channels,
            base_channels=vq.channels,
            channel_multiplier=list(vq.multipliers),
            num_res_blocks=vq.blocks,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=v.image,
        tie_word_embeddings=False,
        architectures=["JanusForConditionalGeneration"],
    )
    generation = GenerationConfig(
        bos_token_id=v.bos,
        eos_token_id=v.eos,
        pad_token_id=v.pad,
        guidance_scale=5,
        temperature=1.0,
        top_k=0,  # transformers' default keeps 50 codes
        do_sample=True,
        generation_kwargs={"boi_token_id": v.boi},
    )
    return {
        "config.json": native.to_dict(),
        "generation_config.json": generation.to_dict(),
        PREPROCESSOR: {
            "image_processor_type": "JanusImageProcessor",
            "processor_class": "JanusProcessor",
            "size": {"height": vision.image_size, "width": vision.image_size},
            "min_size": vision.min_side,
            "image_mean": HALF,  # the class's defaults are CLIP's
            "image_std": HALF,
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {"processor_class": "JanusProcessor", "num_image_tokens": tokens},
    }
