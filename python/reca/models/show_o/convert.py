"""Show-o's published folders <-> our modules. The parameter names are the same; CLIP's changed between releases."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from reca.models.show_o.config import ClipSizes
from reca.models.weights import read_tensors

WEIGHTS = ("pytorch_model.safetensors", "pytorch_model.bin", "model.safetensors")


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a published folder (its weight file has one of three names), or of a file.

    Raises ValueError when the folder holds none.
    """
    if folder.is_file():
        return read_tensors(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise ValueError(f"{folder} holds none of {', '.join(WEIGHTS)}; give the folder of a Show-o checkpoint")


def published(folder: Path) -> dict:
    """config.json of a published folder; empty when there is none."""
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def clip_native(state: dict[str, Tensor], sizes: ClipSizes) -> dict[str, Tensor]:
    """CLIP's vision tower in transformers 5 names, without the last layer, from 4.x or 5.x files with or without text."""
    native = {}
    for name, tensor in state.items():
        if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
            continue
        name = name.removeprefix("vision_model.")
        if name.startswith(f"encoder.layers.{sizes.num_hidden_layers - 1}.") or name.endswith("position_ids"):
            continue
        native[name] = tensor
    return native


def write(folder: Path, config: dict, state: dict[str, Tensor]) -> None:
    """A folder in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / WEIGHTS[0], {"format": "pt"})
