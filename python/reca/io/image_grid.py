"""Combine several images into one."""

import math

import torch
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between images


def beside(left: Tensor, right: Tensor) -> Tensor:
    """Place two images (uint8 [3, H, W]) side by side on white."""
    height = max(left.shape[1], right.shape[1])
    sheet = torch.full((3, height, left.shape[2] + GAP + right.shape[2]), 255, dtype=torch.uint8)
    sheet[:, : left.shape[1], : left.shape[2]] = left.cpu()
    sheet[:, : right.shape[1], -right.shape[2] :] = right.cpu()
    return sheet


def make_grid(images: list[Tensor], columns: int | None = None) -> Image.Image:
    """Paste images (uint8 [3, H, W]) on white, row by row. columns: None makes the grid about square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    height = max(image.shape[1] for image in images) + GAP
    width = max(image.shape[2] for image in images) + GAP
    grid = Image.new("RGB", (columns * width - GAP, math.ceil(len(images) / columns) * height - GAP), "white")
    for i, image in enumerate(images):
        place = (i % columns * width, i // columns * height)
        grid.paste(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), place)
    return grid
