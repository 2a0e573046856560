"""GenEval's detector without mmdet: OpenMMLab's Mask2Former weights in transformers, with mmdet's own pre- and
post-processing.

Sources: mmdet 2.28.2 and mmcv 1.7.2 (configs/mask2former, swin-s, COCO), and the key map in tests/golden/eval.
The image processor of transformers resizes, pads and scales differently, so it is not used.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from reca.data.pixels import as_rgb
from reca.eval.errors import EvaluationError
from reca.io.paths import is_file

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
IMG_SCALE = (1333, 800)  # maximum pixels of the long and the short side
DIVISOR, PAD_VALUE = 32, 128  # padding comes before normalisation
MAX_PER_IMAGE = 100
CHECKPOINT = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
CHECKPOINT_HELP = (
    f"Use OpenMMLab's {CHECKPOINT} (from download.openmmlab.com/mmdetection/v2.0/mask2former/); Facebook's "
    "mask2former-swin-small-coco-instance is from another training run"
)
# Depths and widths of swin-s.
SWIN_S: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]}


# ---- preprocessing ----


class Geometry(NamedTuple):
    """(height, width) of the original, the resized and the padded image."""

    original: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]


def read_rgb(path: Path) -> np.ndarray:
    """Read an image as mmcv does: uint8 [H, W, 3], EXIF rotation applied, alpha dropped."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "RGBA":  # drop alpha without blending
            return np.asarray(upright)[..., :3].copy()
        return np.asarray(as_rgb(upright) if upright.mode.startswith("I") else upright.convert("RGB"))


def preprocess(pixels: np.ndarray, img_scale: tuple[int, int] = IMG_SCALE) -> tuple[Tensor, Geometry]:
    """Resize, pad and normalise. pixels: uint8 [H, W, 3] RGB. Return float32 [3, H', W'] and the Geometry."""
    height, width = pixels.shape[:2]
    long, short = max(img_scale), min(img_scale)
    scale = min(long / max(height, width), short / min(height, width))
    resized = int(height * scale + 0.5), int(width * scale + 0.5)
    small = resize_bilinear(pixels, *resized)
    padded = tuple(math.ceil(side / DIVISOR) * DIVISOR for side in resized)
    canvas = np.full((*padded, 3), PAD_VALUE, dtype=np.uint8)
    canvas[: resized[0], : resized[1]] = small
    mean, std = np.array(MEAN, dtype=np.float64), np.array(STD, dtype=np.float64)
    # As mmcv, which subtracts and multiplies in place on float32 with double constants.
    values = canvas.astype(np.float32)
    values = (values - mean).astype(np.float32)
    values = (values * (1 / std)).astype(np.float32)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous(), Geometry((height, width), resized, padded)  # type: ignore[arg-type]


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize as cv2.resize(INTER_LINEAR) does for 8-bit data: 11-bit fixed-point weights, no antialiasing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    x, wx0, wx1 = _taps(pixels.shape[1], width, clamp=True)
    y, wy0, wy1 = _taps(pixels.shape[0], height, clamp=False)
    right, rows = pixels.shape[1] - 1, pixels.shape[0] - 1
    source = pixels.astype(np.int32)
    across = source[:, x] * wx0[:, None] + source[:, np.minimum(x + 1, right)] * wx1[:, None]
    top, bottom = across[y.clip(0, rows)] >> 4, across[(y + 1).clip(0, rows)] >> 4
    out = ((wy0[:, None, None] * top) >> 16) + ((wy1[:, None, None] * bottom) >> 16)
    return ((out + 2) >> 2).clip(0, 255).astype(np.uint8)


def _taps(source: int, target: int, clamp: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the first source index and the two weights, in units of 1/2048, of each target pixel.

    clamp: give the full weight to the border pixel, as cv2 does horizontally. Vertically it keeps the weights.
    """
    ratio = 1 / (target / source)
    position = ((np.arange(target) + 0.5) * ratio - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int32)
    fraction = position - first.astype(np.float32)
    if clamp:
        fraction = np.where((first < 0) | (first >= source - 1), np.float32(0), fraction)
        first = first.clip(0, source - 1)
    one = np.float32(1)
    w0, w1 = (np.rint(weight * np.float32(2048)).astype(np.int32) for weight in (one - fraction, fraction))
    return first, w0, w1


# ---- post-processing ----


class Detections(NamedTuple):
    """labels int64 [N], scores float32 [N], boxes float32 [N, 4] (x0, y0, x1, y1), masks bool [N, H, W]."""

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor


def postprocess(
    class_logits: Tensor, mask_logits: Tensor, geometry: Geometry, max_per_image: int = MAX_PER_IMAGE
) -> Detections:
    """Compute detections from the last layer's logits as mmdet does.

    class_logits: [Q, C + 1]. mask_logits: [Q, h, w], at stride 4.
    """
    masks = mask_logits[None]
    masks = F.interpolate(masks, size=geometry.padded, mode="bilinear", align_corners=False)
    masks = masks[..., : geometry.resized[0], : geometry.resized[1]]
    masks = F.interpolate(masks, size=geometry.original, mode="bilinear", align_corners=False)[0]
    classes = class_logits.shape[-1] - 1
    scores = class_logits.softmax(-1)[:, :-1].flatten()
    scores, places = scores.topk(min(max_per_image, scores.numel()), sorted=False)
    logits = masks[places // classes]
    binary = logits > 0
    inside = binary.float()
    mask_scores = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return Detections(places % classes, scores * mask_scores, mask_boxes(binary), binary)


def mask_boxes(masks: Tensor) -> Tensor:
    """Return float32 [N, 4] boxes around masks [N, H, W], the far corner exclusive; zeros for an empty mask."""
    boxes = torch.zeros(len(masks), 4, dtype=torch.float32)
    for box, rows, columns in zip(boxes, masks.any(2), masks.any(1), strict=True):
        y, x = rows.nonzero()[:, 0], columns.nonzero()[:, 0]
        if len(x):
            box[:] = torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)
    return boxes


# ---- weights ----


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder mmdet's weights for transformers' Mask2FormerForUniversalSegmentation.

    Raises EvaluationError for an unknown key.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        for name, tensor in _converted(key.removeprefix("module."), value):
            converted[name] = tensor
    return converted


def _converted(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if key.endswith("relative_position_index"):
        return  # recomputed
    for rule in (_backbone, _pixel_decoder, _transformer):
        if (names := rule(key)) is not None:
            break
    else:
        raise EvaluationError(f"unknown weight {key!r} for mmdet's Mask2Former with a Swin backbone. {CHECKPOINT_HELP}")
    if len(names) == 3:  # fused query, key and value
        yield from zip(names, value.chunk(3), strict=True)
    elif ".downsample." in key:
        yield names[0], _patch_merging(value)
    else:
        yield names[0], value


def _patch_merging(value: Tensor) -> Tensor:
    """Reorder columns from nn.Unfold's order, 4*c + 2*row + col, to that of transformers, (row + 2*col)*C + c."""
    channels = value.shape[-1] // 4
    return value.unflatten(-1, (channels, 2, 2)).movedim((-1, -2, -3), (-3, -2, -1)).flatten(-3)


SWIN = "model.pixel_level_module.encoder"
PIXEL = "model.pixel_level_module.decoder"
DECODER = "model.transformer_module.decoder"


def _three(prefix: str, kind: str) -> list[str]:
    return [f"{prefix}.{name}_proj.{kind}" for name in "qkv"]


def _backbone(key: str) -> list[str] | None:
    if (m := re.fullmatch(r"backbone\.norm(\d)\.(\w+)", key)) is not None:
        return [f"{SWIN}.hidden_states_norms.stage{int(m[1]) + 1}.{m[2]}"]
    if (m := re.fullmatch(r"backbone\.patch_embed\.(projection|norm)\.(\w+)", key)) is not None:
        part = "patch_embeddings.projection" if m[1] == "projection" else "norm"
        return [f"{SWIN}.swin.embeddings.{part}.{m[2]}"]
    if (m := re.fullmatch(r"backbone\.stages\.(\d)\.downsample\.(.+)", key)) is not None:
        return [f"{SWIN}.swin.encoder.layers.{m[1]}.downsample.{m[2]}"]
    if (m := re.fullmatch(r"backbone\.stages\.(\d)\.blocks\.(\d+)\.(.+)", key)) is None:
        return None
    block, rest = f"{SWIN}.swin.encoder.layers.{m[1]}.blocks.{m[2]}", m[3]
    if rest == "attn.w_msa.relative_position_bias_table":
        return [f"{block}.attention.relative_position_bias.relative_position_bias_table"]
    part, _, kind = rest.rpartition(".")
    if part == "attn.w_msa.qkv":
        return _three(f"{block}.attention", kind)
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.w_msa.proj": "attention.o_proj",
        "ffn.layers.0.0": "mlp.fc1",
        "ffn.layers.1": "mlp.fc2",
    }
    return [f"{block}.{names[part]}.{kind}"] if part in names else None


def _pixel_decoder(key: str) -> list[str] | None:
    if not key.startswith("panoptic_head.pixel_decoder."):
        return None
    rest = key.removeprefix("panoptic_head.pixel_decoder.")
    if rest == "level_encoding.weight":
        return [f"{PIXEL}.level_embed"]
    part, _, kind = rest.rpartition(".")
    if part == "mask_feature":
        return [f"{PIXEL}.mask_projection.{kind}"]
    if (m := re.fullmatch(r"(input_convs|lateral_convs|output_convs)\.(\d)\.(conv|gn)", part)) is not None:
        number = int(m[2])
        target = {"input_convs": f"input_projections.{number}", "lateral_convs": f"adapter_{number + 1}"}
        name = target.get(m[1], f"layer_{number + 1}")
        return [f"{PIXEL}.{name}.{0 if m[3] == 'conv' else 1}.{kind}"]
    if (m := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", part)) is None:
        return None
    names = {
        "norms.0": "self_attn_layer_norm",
        "norms.1": "final_layer_norm",
        "ffns.0.layers.0.0": "fc1",
        "ffns.0.layers.1": "fc2",
    }
    name = names.get(m[2]) or m[2].replace("attentions.0", "self_attn")
    return [f"{PIXEL}.encoder.layers.{m[1]}.{name}.{kind}"]


def _transformer(key: str) -> list[str] | None:
    if not key.startswith("panoptic_head."):
        return None
    rest = key.removeprefix("panoptic_head.")
    if rest.startswith("cls_embed."):
        return [rest.replace("cls_embed", "class_predictor")]
    embeddings = {
        "query_embed": "queries_embedder",
        "query_feat": "queries_features",
        "level_embed": "level_embed",
    }
    part, _, kind = rest.rpartition(".")
    if part in embeddings:
        return [f"model.transformer_module.{embeddings[part]}.{kind}"]
    if (m := re.fullmatch(r"mask_embed\.(\d)", part)) is not None:
        return [f"{DECODER}.mask_predictor.mask_embedder.{int(m[1]) // 2}.0.{kind}"]
    if part == "transformer_decoder.post_norm":
        return [f"{DECODER}.layernorm.{kind}"]
    if (m := re.fullmatch(r"transformer_decoder\.layers\.(\d+)\.(.+)", rest)) is None:
        return None
    layer, inner = f"{DECODER}.layers.{m[1]}", m[2]
    inner_part, _, kind = inner.rpartition(".")
    if inner_part == "attentions.1.attn" and kind.startswith("in_proj_"):
        return _three(f"{layer}.self_attn", kind.removeprefix("in_proj_"))
    inner = inner.replace("attentions.0.attn.", "cross_attn.").replace("attentions.1.attn.", "self_attn.")
    norms = ("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")
    for number, norm in enumerate(norms):
        inner = inner.replace(f"norms.{number}.", f"{norm}.")
    return [f"{layer}.{inner.replace('ffns.0.layers.0.0', 'fc1').replace('ffns.0.layers.1', 'fc2')}"]


def configuration(**sizes: Any) -> Any:
    """Return the transformers configuration of OpenMMLab's swin-s model on COCO.

    sizes: overrides, keyword arguments of Mask2FormerConfig, and `swin` with those of SwinConfig.
    """
    from transformers import Mask2FormerConfig, SwinConfig

    swin = SWIN_S | sizes.pop("swin", {})
    backbone = SwinConfig(
        image_size=224, patch_size=4, window_size=7, mlp_ratio=4.0, qkv_bias=True, layer_norm_eps=1e-5,
        hidden_act="gelu", out_features=["stage1", "stage2", "stage3", "stage4"], **swin,
    )  # fmt: skip
    given = {
        "num_labels": 80, "num_queries": 100, "feature_size": 256, "mask_feature_size": 256, "hidden_dim": 256,
        "encoder_layers": 6, "encoder_feedforward_dim": 1024, "decoder_layers": 10, "dim_feedforward": 2048,
        "num_attention_heads": 8, "pre_norm": False, "feature_strides": [4, 8, 16, 32], "common_stride": 4,
        "enforce_input_projection": False,
    }  # fmt: skip
    return Mask2FormerConfig(backbone_config=backbone, **(given | sizes))


def build(state: Mapping[str, Tensor], config: Any) -> Any:
    """Build the transformers model and load converted weights. Raises EvaluationError if they do not match."""
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation(config)
    converted = convert(state)
    wanted = model.state_dict()
    wrong = [k for k, v in converted.items() if k not in wanted or wanted[k].shape != v.shape]
    unused = (".swin.layernorm.", "criterion.")  # not read in the forward pass
    missing = [k for k in wanted if k not in converted and not any(part in f".{k}" for part in unused)]
    if wrong or missing:
        names = ", ".join([*wrong, *missing][:5])
        raise EvaluationError(
            f"the weights do not match Mask2Former with swin-s: {len(wrong)} have other names or shapes, "
            f"{len(missing)} are missing, such as {names}. {CHECKPOINT_HELP}"
        )
    model.load_state_dict({k: v.float() for k, v in converted.items()}, strict=False)
    return model.eval()


def check_checkpoint(path: Path) -> None:
    """Raise EvaluationError if the file does not exist."""
    if not is_file(path):
        raise EvaluationError(f"{path} does not exist. {CHECKPOINT_HELP}")


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read mmdet's checkpoint file (.pth or .safetensors). Raises EvaluationError if it cannot be read."""
    from reca.io.files import damage

    check_checkpoint(path)
    if cause := damage(path):
        raise EvaluationError(f"{path} {cause}. {CHECKPOINT_HELP}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for damaged files
        raise EvaluationError(f"{path} cannot be read ({type(error).__name__}: {error}). {CHECKPOINT_HELP}") from error
    return content.get("state_dict", content)


class Detector:
    """Detects objects of the COCO classes, one image at a time."""

    def __init__(self, model: Any, device: torch.device | str = "cpu", img_scale: tuple[int, int] = IMG_SCALE):
        self.model, self.device, self.img_scale = model.to(device), device, img_scale

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray, max_per_image: int = MAX_PER_IMAGE) -> Detections:
        """Detect objects. pixels: uint8 [H, W, 3] RGB."""
        values, geometry = preprocess(pixels, self.img_scale)
        found = self.model(pixel_values=values[None].to(self.device))
        class_logits, mask_logits = found.class_queries_logits[0].float(), found.masks_queries_logits[0].float()
        parts = postprocess(class_logits, mask_logits, geometry, max_per_image)
        return Detections(*(part.cpu() for part in parts))
