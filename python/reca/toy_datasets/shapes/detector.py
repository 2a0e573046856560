"""A deterministic detector for the toy dataset `shapes`, and GenEval-style checks of an image against a prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.shapes.scenes import BACKGROUND, COLOURS, MASKS, SIZE

MIN_PIXELS = 8
MIN_PURITY = 0.8
MIN_OVERLAP = 0.75

_NAMES = ("background", *COLOURS)
_PALETTE = torch.tensor([(BACKGROUND,) * 3, *COLOURS.values()]) * 255


@dataclass(frozen=True)
class Found:
    thing: Thing
    row: float
    column: float


def detect(image: Tensor) -> list[Found] | None:
    """Detect the objects in an image (uint8 [3, H, W]). Return None if any region matches no known object.

    Each pixel is assigned the nearest palette colour. An 8-connected region of at least 8 pixels is an object if at
    least 80 % of it has one colour and its IoU with a shape is at least 0.75. Smaller regions are ignored.
    """
    names = (image.permute(1, 2, 0).float()[:, :, None] - _PALETTE).square().sum(-1).argmin(-1)
    found = []
    for region in _regions((names > 0).tolist()):
        if len(region) < MIN_PIXELS:
            continue
        rows, columns = zip(*region, strict=True)
        votes = torch.bincount(torch.stack([names[r, c] for r, c in region]), minlength=len(_NAMES))
        colour, count = int(votes.argmax()), int(votes.max())
        shape, overlap = _shape(rows, columns)
        if count < MIN_PURITY * len(region) or overlap < MIN_OVERLAP:
            return None
        found.append(Found(Thing(_NAMES[colour], shape), sum(rows) / len(rows), sum(columns) / len(columns)))
    return found


def _regions(filled: list[list[bool]]) -> list[list[tuple[int, int]]]:
    height, width = len(filled), len(filled[0])
    todo = {(r, c) for r in range(height) for c in range(width) if filled[r][c]}
    regions = []
    while todo:
        region, stack = [], [todo.pop()]
        while stack:
            r, c = stack.pop()
            region.append((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
            todo -= near
            stack += near
        regions.append(region)
    return regions


def _shape(rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[str, float]:
    """Return the best-matching shape and its IoU, over placements within two pixels of the region's corner."""
    top, left, reach = min(rows), min(columns), SIZE + 8
    if max(rows) - top >= reach - 4 or max(columns) - left >= reach - 4:
        return "square", 0.0
    region = torch.zeros(reach, reach, dtype=torch.bool)
    region[torch.tensor(rows) - top + 2, torch.tensor(columns) - left + 2] = True
    best = ("square", 0.0)
    for name, mask in MASKS.items():
        for i in range(5):
            for j in range(5):
                placed = torch.zeros_like(region)
                placed[i : i + SIZE, j : j + SIZE] = mask
                overlap = float((region & placed).sum() / (region | placed).sum())
                if overlap > best[1]:
                    best = (name, overlap)
    return best


def shows(image: Tensor, scene: Scene, colours: bool, layout: bool) -> bool:
    """Tell whether the image shows exactly the scene's shapes. colours, layout: check these, too."""
    found = detect(image)
    if found is None or len(found) != len(scene.things):
        return False
    return any(_matches(order, scene, colours, layout) for order in (found, found[::-1]))


def _matches(found: list[Found], scene: Scene, colours: bool, layout: bool) -> bool:
    for got, wanted in zip(found, scene.things, strict=True):
        if got.thing.kind != wanted.kind or (colours and got.thing.colour != wanted.colour):
            return False
    if not layout or scene.relation is None:
        return True
    down, right = found[1].row - found[0].row, found[1].column - found[0].column
    far, aside = (down, right) if scene.relation == "above" else (right, down)
    return far >= SIZE and abs(aside) < SIZE / 2
