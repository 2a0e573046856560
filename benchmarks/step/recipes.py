"""The recipes that are benchmarked, by model and size: with random weights and without downloads.

tiny     the recipe of the shapes dataset, for tests
narrow   the published widths and sequence lengths, with one layer of every trained stack, two layers of frozen
         encoders, patches instead of the codec, and one image, in fp32: for a CPU. BAGEL has half its width, since a
         step at full width takes over a minute
real     the published model in bf16, with the batch sizes of BATCHES
quarter  the same with a quarter of the layers of every trained stack, where both forms of BAGEL fit on one GPU
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.models.show_o.weights import PHI_TOKENS

SIZES = ("tiny", "narrow", "quarter", "real")
NAMES = {  # model -> the recipes of its sizes
    "show_o": ("show_o_tiny", "show_o_512"),
    "harmon": ("harmon_tiny", "harmon_1_5b"),
    "open_uni": ("open_uni_tiny", "open_uni_l_512"),
    "bagel": ("bagel_tiny", "bagel_7b"),
    "janus": ("janus_tiny", "janus_pro_1b"),
    "janusflow": ("janusflow_tiny", "janusflow_1_3b"),
}
MODELS = tuple(NAMES)
MODEL_OF = {recipe: model for model, recipes in NAMES.items() for recipe in recipes}
# Keys of a published recipe that name files; null initialises the component randomly.
FILES = ("weights", "codec_weights", "clip_weights", "tokenizer", "mllm", "dit")
IMAGES, SIDE = 8, 1024  # number and side of the JPEG files that replace the dataset

# Overrides of the toy recipes to match the published ones.
TINY = {
    "show_o": {"model.parity": True, "train.roles": None, "train.frozen": []},
    "harmon": {"model.parity": True, "train.frozen": []},
    "open_uni": {"model.parity": True},
    "bagel": {"model.parity": True},
    "janus": {},
    "janusflow": {},
}
QWEN = "model.language."
NARROW = {
    "show_o": {
        "model.phi.num_hidden_layers": 1,
        "model.clip.num_hidden_layers": 2,
        "model.codec": "patches",
        "model.patches.size": 16,
        "model.patches.entries": 8192,
    },
    "harmon": {
        QWEN + "num_hidden_layers": 1,
        "model.mar.encoder_depth": 1,
        "model.mar.decoder_depth": 1,
        "model.mar.head_depth": 1,
        "model.codec": "patches",
        "model.autoencoder.patch": 16,
    },
    "open_uni": {
        QWEN + "num_hidden_layers": 1,
        "model.vision.num_hidden_layers": 2,
        "model.connector.num_hidden_layers": 1,
        "model.sana.num_layers": 1,
        "model.codec": "patches",
        "model.patches.size": 32,
        "model.patches.channels": 32,
    },
    "bagel": {
        QWEN + "num_hidden_layers": 1,
        QWEN + "hidden_size": 1792,
        QWEN + "num_attention_heads": 14,
        QWEN + "num_key_value_heads": 2,
        QWEN + "intermediate_size": 9472,
        "model.vision.num_hidden_layers": 2,
        "model.codec": "patches",
        "model.patches.size": 8,
        "model.patches.channels": 16,
        "model.dtype": "fp32",
    },
    "janus": {
        QWEN + "num_hidden_layers": 1,
        "model.vision.num_hidden_layers": 2,
        "model.codec": "patches",
        "model.patches.size": 16,
        "model.patches.entries": 16384,
    },
    "janusflow": {
        QWEN + "num_hidden_layers": 1,
        "model.vision.num_hidden_layers": 2,
        "model.generation.encoder_blocks": 1,
        "model.generation.decoder_blocks": 1,
        "model.codec": "patches",
        "model.patches.size": 8,
        "model.patches.channels": 4,
    },
}
QUARTER = {
    "show_o": {"model.phi.num_hidden_layers": 6},
    "harmon": {
        QWEN + "num_hidden_layers": 7,
        "model.mar.encoder_depth": 5,
        "model.mar.decoder_depth": 5,
        "model.mar.head_depth": 3,
    },
    "open_uni": {QWEN + "num_hidden_layers": 7, "model.connector.num_hidden_layers": 2, "model.sana.num_layers": 5},
    "bagel": {QWEN + "num_hidden_layers": 7},
    "janus": {QWEN + "num_hidden_layers": 6},
    "janusflow": {QWEN + "num_hidden_layers": 6},
}
REAL = {
    "show_o": (10, 2),
    "harmon": (96, 48),
    "open_uni": (84, 42),
    "bagel": (8, 2),
    "janus": (16, 8),
    "janusflow": (16, 8),
}
# Images per step and per micro-batch.
BATCHES = {
    "tiny": dict.fromkeys(MODELS, (4, 2)),
    "narrow": dict.fromkeys(MODELS, (1, 1)),
    "quarter": REAL,
    "real": REAL,
}


def step_recipe(model: str, size: str, folder: Path, changed: dict | None = None) -> Recipe:
    """Return the recipe of a RECA step. folder: for the run and its images. changed: further overrides."""
    tiny, published = NAMES[model]
    images, micro_batch = BATCHES[size][model]
    keys = {
        "run_dir": str(folder / "run"),
        "train.steps": 10**6,
        "objective.reca.batch_size": images,
        "objective.reca.micro_batch": micro_batch,
        "objective.i2t.weight": 0,
        "objective.t2i.weight": 0,
        "log.tensorboard": False,
        "checkpoint.every": 0,
    }
    if size == "tiny":
        return load_recipe(tiny, keys | {"data.workers": 0} | TINY[model] | (changed or {}))
    keys |= {f"model.{name}": None for name in FILES if hasattr(load_recipe(published).model, name)}
    keys |= {"data.images": str(image_files(folder)), "model.words": words(model)}
    if size == "narrow":
        keys |= NARROW[model] | {"train.precision": "fp32", "data.workers": 0, "data.decoder": "pillow"}
    elif size == "quarter":
        keys |= QUARTER[model]
    return load_recipe(published, keys | (changed or {}))


def words(model: str) -> list[str]:
    """Return a vocabulary. Show-o's determines the size of its embedding table; other recipes state that size."""
    return [f"word{i}" for i in range(PHI_TOKENS - 6)] if model == "show_o" else ["a"]


def image_files(folder: Path) -> Path:
    """Write smooth random JPEG files, once, and return their folder."""
    out = folder / "images"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder))
        numbers = np.random.default_rng(0)
        for i in range(IMAGES):
            coarse = Image.fromarray(numbers.integers(0, 256, (48, 48, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(made / f"{i}.jpg", quality=90)
        made.rename(out)
    return out
