"""OpenUni's published names <-> the names of the library classes it is built from."""

import re
from pathlib import Path

from torch import Tensor

from reca.models.common.exporting import export_to
from reca.models.common.weight_files import read_tensors

# InternVL's original layout -> transformers' layout. qkv is split in three and handled apart.
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
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
]  # fmt: skip
_QKV = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$")

FILE, FROZEN = "open_uni.pth", "frozen.safetensors"
TRAINED = ("meta_queries", "connector.", "projector.", "transformer.")
REQUIRED = ("meta_queries", "connector.", "projector.")


def mllm_native(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """InternVL3 in original or transformers names -> transformers names."""
    state = {name.removeprefix("lmm."): tensor for name, tensor in state.items()}
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
    """A published OpenUni file: any subset of connector.*, projector.*, meta_queries, transformer.*.

    Raises ValueError when it holds anything else that is not a frozen part.
    """
    state = read_tensors(path / FILE if (path / FILE).is_file() else path)
    unknown = sorted(n for n in state if not n.startswith((*TRAINED, "lmm.", "vae.")))
    if unknown:
        raise ValueError(
            f"{path} is no OpenUni file: it holds {unknown[:5]}; expected names under {', '.join(TRAINED)}"
        )
    return {name: tensor for name, tensor in state.items() if name.startswith(TRAINED)}


def overlay(paths: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """Later files over earlier ones. Returns the tensors and a report line per file."""
    merged, report = {}, []
    for path in paths:
        part = read_parts(path)
        counts = {prefix.rstrip("."): sum(n.startswith(prefix) for n in part) for prefix in TRAINED}
        report.append(
            f"{path.name}: " + ", ".join(f"{count} tensors of {name}" for name, count in counts.items() if count)
        )
        merged |= part
    absent = [prefix.rstrip(".") for prefix in REQUIRED if not any(n.startswith(prefix) for n in merged)]
    if absent:
        raise ValueError(
            f"{', '.join(path.name for path in paths)} holds no {', '.join(absent)}; an OpenUni file must have "
            "connector, projector and meta_queries (give the base file as model.weights, a RECA file as model.overlay)"
        )
    return merged, report


def save(state: dict[str, Tensor], folder: Path, frozen_too: bool) -> list[str]:
    """Write the trained parts as the .pth that OpenUni's inference code loads, and perhaps the others beside it."""
    with export_to(folder) as out:
        out.pickled(FILE, {name: tensor for name, tensor in state.items() if name.startswith(TRAINED)})
        if frozen_too:
            out.tensors(FROZEN, {name: tensor for name, tensor in state.items() if not name.startswith(TRAINED)})
        return out.done()


def frozen_beside(weights: str) -> Path | None:
    """The frozen parts that `save` wrote beside the trained ones, if it did. weights: the folder, or the .pth in it."""
    path = Path(weights).expanduser()
    path = (path if path.is_dir() else path.parent) / FROZEN
    return path if path.is_file() else None
