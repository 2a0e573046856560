"""Bytes of a picture -> the views an adapter asks for. Pillow's decoder is the definition; DALI's must agree."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from reca.data.sources import DataError
from reca.data.views import View, Views
from reca.draws import Draws, Purpose

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_SIDE = 2**15  # a picture larger than this on a side is taken for a broken header


class BadImage(ValueError):
    """Bytes that are no readable picture; the message says why."""


def open_rgb(data: bytes) -> Image.Image:
    """A decoded RGB picture, upright, transparency on white. Raises BadImage."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            if max(file.size) > MAX_SIDE:
                raise BadImage(f"{file.size[0]} x {file.size[1]} pixels")
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: keep the upper 8
                values = np.asarray(image, dtype=np.float64)
                image = Image.fromarray((values / 257 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        raise BadImage("no picture in a format that Pillow knows") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken bytes
        raise BadImage(f"{type(error).__name__}: {error}") from error


def read_image(path: Path) -> Tensor:
    """A picture file as uint8 [3, H, W]. Raises DataError."""
    if not path.is_file():
        raise DataError(f"image {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        return _tensor(open_rgb(path.read_bytes()))
    except BadImage as error:
        raise DataError(f"{path} is no readable picture: {error}") from error


def bound_size(width: int, height: int, view: View) -> tuple[int, int]:
    """(width, height) of fit "bound": see View. The rounding is BAGEL's, including its area rule."""

    def rounded(w: float, h: float, scale: float) -> tuple[int, int]:
        return tuple(max(view.stride, round(round(side * scale) / view.stride) * view.stride) for side in (w, h))

    scale = min(view.size / max(width, height), 1.0)
    scale = max(scale, view.min_size / min(width, height))
    w, h = rounded(width, height, scale)
    if view.max_pixels and w * h > view.max_pixels:
        w, h = rounded(w, h, view.max_pixels / (w * h))
    if max(w, h) > view.size:
        w, h = rounded(w, h, view.size / max(w, h))
    return w, h


def geometry(
    width: int, height: int, view: View, crop: float
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Source box (left, top, right, bottom) and target (width, height) of a view.

    crop: in [0, 1), where along the longer side a random crop lies.
    """
    whole, short = (0, 0, width, height), min(width, height)
    if view.fit in ("squash", "stretch", "pad"):
        return whole, (view.size, view.size)
    if view.fit == "bound":
        return whole, bound_size(width, height, view)
    if view.fit == "random_crop":
        left, top = (int(crop * (side - short + 1)) for side in (width, height))
        return (left, top, left + short, top + short), (view.size, view.size)
    if view.fit == "center_crop":  # resize the short side, then cut whole pixels from the middle
        scale = view.size / short
        w, h = (max(view.size, round(side * scale)) for side in (width, height))
        left, top = (w - view.size) // 2, (h - view.size) // 2
        box = (left / w * width, top / h * height, (left + view.size) / w * width, (top + view.size) / h * height)
        return box, (view.size, view.size)
    raise ValueError(f"unknown fit {view.fit!r}; expected squash, stretch, center_crop, random_crop, pad or bound")


def make_view(image: Image.Image, view: View, crop: float = 0.5) -> Tensor:
    """uint8 [3, H, W]."""
    if view.fit == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), (view.fill,) * 3)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    elif view.fit == "stretch":
        image = image.resize((max(image.size),) * 2, RESAMPLE[view.resample])
    box, size = geometry(*image.size, view, crop)
    image = image.resize(size, RESAMPLE[view.resample], box=box)
    if view.blur > 1:
        small = [max(1, math.ceil(side / view.blur)) for side in size]
        image = image.resize(small, Image.Resampling.BILINEAR).resize(size, Image.Resampling.BILINEAR)
    return _tensor(image)


class PillowDecoder:
    """Views of single pictures."""

    def __init__(self, views: Views, draws: Draws):
        self.views, self.draws = views, draws

    def __call__(self, data: bytes, sample_id: int) -> tuple[Tensor | None, Tensor | None]:
        """(gen, und), uint8 [3, H, W] each. Raises BadImage."""
        image = open_rgb(data)
        crop = crop_position(self.views, self.draws, sample_id)
        return tuple(view and make_view(image, view, crop) for view in (self.views.gen, self.views.und))


def crop_position(views: Views, draws: Draws, sample_id: int) -> float:
    """Both views of a sample are cropped at the same place."""
    if not any(view and view.fit == "random_crop" for view in (views.gen, views.und)):
        return 0.5
    return float(draws.uniform(Purpose.CROP, torch.tensor([sample_id])))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
