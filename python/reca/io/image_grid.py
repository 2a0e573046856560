"""Images of tensors: one, or several in a grid."""

import math

from PIL import Image
from torch import Tensor

GAP = 2  # pixels between images


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert an image, uint8 [3, H, W]."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def enlarged(image: Image.Image, times: int) -> Image.Image:
    """Enlarge a small image by an integer factor, each pixel to a square."""
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def make_grid(images: list[Tensor], columns: int | None = None) -> Image.Image:
    """Paste images (uint8 [3, H, W]) on white, row by row. columns: None makes the grid about square."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    height = max(image.shape[1] for image in images) + GAP
    width = max(image.shape[2] for image in images) + GAP
    grid = Image.new("RGB", (columns * width - GAP, math.ceil(len(images) / columns) * height - GAP), "white")
    for i, image in enumerate(images):
        grid.paste(to_pil(image), (i % columns * width, i // columns * height))
    return grid
