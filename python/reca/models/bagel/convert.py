"""BAGEL's published files <-> our modules.

Names in the main file are ours.
"""

from pathlib import Path

from torch import Tensor

from reca.files import read_json
from reca.models.bagel.config import BagelConfig
from reca.models.common.weight_files import read_tensors

PUBLISHED = "ema.safetensors"
# what BAGEL publishes, what the release's trainer saves, what RECA publishes
SINGLE = (PUBLISHED, "model.safetensors", "model_bf16.safetensors")
WEIGHTS = (*SINGLE, *(f"{name}.index.json" for name in SINGLE))
CODEC = "ae.safetensors"
HUB = ["*.safetensors", "*.json", "*.txt"]  # what there is to download


def read(source: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, or of the one that a folder holds. Raises ValueError for none and for several."""
    if source.is_file():
        return read_tensors(source)
    found = [name for name in WEIGHTS if (source / name).is_file()]
    if len(found) != 1:
        what = f"{' and '.join(found)}; name the file that is meant" if found else f"none of {', '.join(WEIGHTS)}"
        raise ValueError(f"{source} holds {what}")
    return read_tensors(source / found[0])


def check(folder: Path, config: BagelConfig) -> None:
    """Raise ValueError when a config.json beside the weights says something else than the recipe."""
    wrong = []
    for file, section in (("llm_config.json", "language"), ("vit_config.json", "vision")):
        if not (folder / file).is_file():
            continue
        found, sizes = read_json(folder / file), getattr(config, section)
        for key in sizes.__dataclass_fields__:
            if key in found and found[key] != getattr(sizes, key):
                wrong.append(f"{file} has {key} {found[key]}, the recipe model.{section}.{key}={getattr(sizes, key)}")
    if wrong:
        raise ValueError(f"{folder} does not fit the recipe: {'; '.join(wrong)}")


def described(config: BagelConfig, bos: int, eos: int) -> dict[str, dict]:
    """The JSON files that the public inference code reads its sizes from."""
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
