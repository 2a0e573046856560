"""The judge of the emoji datasets: the nearest reference image, and an independent check of hues."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from reca.io.image_grid import to_pil
from reca.toy_datasets.dataset import Prompt
from reca.toy_datasets.emoji.artwork import HUES, MIDDLE, THINGS, View, draw
from reca.toy_datasets.scene import Thing

LIMIT = 0.006  # largest MSE to the nearest reference image, for pixels in [0, 1]
SATURATED, BRIGHT = 100, 60  # of 255; pixels above both have a hue
MIN_PURITY = 0.6  # fraction of them that must have the same colour


@lru_cache(maxsize=2)
def _true_images(views: tuple[View, ...]) -> Tensor:  # fp32 [n * views, 3 * SIDE * SIDE]
    return torch.stack([draw(thing, view) for thing in THINGS for view in views]).flatten(1) / 255


@lru_cache(maxsize=2)
def _squares(views: tuple[View, ...]) -> Tensor:  # fp32 [n * views]
    return _true_images(views).square().sum(1)


def nearest(image: Tensor, views: tuple[View, ...] = (MIDDLE,)) -> tuple[Thing, float]:  # uint8 [3, SIDE, SIDE]
    """Return the thing with the nearest reference image, and the MSE to it. views: reference views of every thing."""
    pixels, images = image.flatten() / 255, _true_images(views)
    best = int((_squares(views) - 2 * (images @ pixels)).argmin())  # one pass over the images; differences take three
    return THINGS[best // len(views)], float((images[best] - pixels).square().mean())


def main_colour(image: Tensor) -> str | None:  # uint8 [3, H, W]
    """Return the colour of at least 60 % of the coloured pixels, each assigned to the nearest hue; None without one."""
    hsv = to_pil(image).convert("HSV")
    hue, saturation, value = (np.array(band, dtype=int) for band in hsv.split())
    hues = hue[(saturation > SATURATED) & (value > BRIGHT)]
    if not len(hues):
        return None
    distances = np.abs((hues[:, None] - np.array(list(HUES.values())) + 128) % 256 - 128)
    votes = np.bincount(distances.argmin(1), minlength=len(HUES)) / len(hues)
    return list(HUES)[votes.argmax()] if votes.max() >= MIN_PURITY else None


def seen(image: Tensor, views: tuple[View, ...] = (MIDDLE,)) -> Thing | None:
    """Return the nearest thing, if its image is within LIMIT and its colour is the image's main colour; else None."""
    thing, distance = nearest(image, views)
    return thing if distance <= LIMIT and main_colour(image) == thing.colour else None


def shows(image: Tensor, prompt: Prompt, views: tuple[View, ...] = (MIDDLE,)) -> bool:
    """Tell whether an image shows the prompt's thing: its kind, and its colour if the prompt names one."""
    found, (wanted,) = seen(image, views), prompt.scene.things
    return found is not None and (found == wanted if prompt.colours else found.kind == wanted.kind)


def describe(image: Tensor, views: tuple[View, ...] = (MIDDLE,)) -> str:
    found = seen(image, views)
    return f"{found.colour} {found.kind}" if found else "no emoji"
