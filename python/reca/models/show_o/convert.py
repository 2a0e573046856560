"""Show-o's published folders <-> our modules. Parameter names are equal, except that transformers renamed CLIP's."""

from pathlib import Path

from torch import Tensor

from reca.files import read_json
from reca.models.common.weight_files import read_tensors

# what Show-o publishes, what the release's trainer saves, what other hub repositories hold
WEIGHTS = ("pytorch_model.safetensors", "pytorch_model.bin", "model.safetensors")
TRAINER = "unwrapped_model"  # the folder inside a checkpoint in which the release's trainer puts the model


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a published folder, or of a weight file. Raises ValueError when the folder holds none."""
    if folder.is_file():
        return read_tensors(folder)
    for inner in (folder, folder / TRAINER):
        for name in WEIGHTS:
            if (inner / name).is_file():
                return read_tensors(inner / name)
            if (inner / f"{name}.index.json").is_file():
                return read_tensors(inner / f"{name}.index.json")
    raise ValueError(f"{folder} holds none of {', '.join(WEIGHTS)}; give the folder of a published checkpoint")


def published(folder: Path) -> dict:
    """config.json of a Show-o folder; empty when there is none."""
    for path in (folder / "config.json", folder / TRAINER / "config.json"):
        if path.is_file():
            return read_json(path)
    return {}


def check(found: dict, wanted: dict, where: str) -> None:
    """Raise ValueError when config.json says something else than the recipe makes.

    wanted: config.json key -> (value, the recipe keys it comes from).
    """
    wrong = [
        f"{key} is {found[key]}, but {source} makes it {value}"
        for key, (value, source) in wanted.items()
        if key in found and found[key] != value
    ]
    if wrong:
        raise ValueError(f"{where}/config.json does not fit the recipe: {'; '.join(wrong)}")


def split(state: dict[str, Tensor], *prefixes: str) -> list[dict[str, Tensor]]:
    """The tensors under each prefix, without it, and last those under none."""
    parts: list[dict[str, Tensor]] = [{} for _ in (*prefixes, None)]
    for name, tensor in state.items():
        at = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), len(prefixes))
        parts[at][name.removeprefix(prefixes[at]) if at < len(prefixes) else name] = tensor
    return parts


def clip_tower(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The first `layers` layers of CLIP's vision tower, named as transformers 5 does.

    Accepts files of transformers 4 (`vision_model.` in front) and 5, with or without the text tower.
    """
    inner, rest = split(state, "vision_model.")
    kept = {}
    for name, tensor in (inner or rest).items():
        layer = name.removeprefix("encoder.layers.").split(".")[0] if name.startswith("encoder.layers.") else "0"
        if int(layer) < layers and not name.startswith("post_layernorm.") and name != "embeddings.position_ids":
            kept[name] = tensor
    return kept
