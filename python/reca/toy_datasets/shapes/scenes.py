"""Scenes of coloured shapes, and their rendering."""

import itertools
import random

import torch
from torch import Tensor

from reca.toy_datasets.scene import Scene, Thing, draw_held_out

SIDE = 20  # pixels of an image
SIZE = 8  # pixels of an object
BACKGROUND = 0.08
NOISE = 0.02
PLACES = (0, 4, 8, 12)  # rows and columns of top left corners: multiples of 4, the size of an image token

COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.90, 0.10, 0.85),
    "cyan": (0.10, 0.85, 0.90),
    "orange": (1.00, 0.55, 0.05),
    "white": (0.95, 0.95, 0.95),
}
MASK_ROWS = {
    "square": "######## ######## ######## ######## ######## ######## ######## ########",
    "circle": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "triangle": "........ ...##... ...##... ..####.. ..####.. .######. .######. ########",
    "cross": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
    "ring": "######## ######## ##....## ##....## ##....## ##....## ######## ########",
    "diamond": "...##... ..####.. .######. ######## ######## .######. ..####.. ...##...",
}
SHAPES = tuple(MASK_ROWS)
RELATIONS = ("left_of", "above")
MASKS = {name: torch.tensor([[c == "#" for c in row] for row in rows.split()]) for name, rows in MASK_ROWS.items()}


def places(scene: Scene, rng: random.Random | None = None) -> list[tuple[int, int]]:
    """Return the top left corner (row, column) of every object. rng: choose randomly among the allowed positions."""
    near, far = PLACES[0], PLACES[-1]
    row, column = (PLACES[2], PLACES[2]) if rng is None else (rng.choice(PLACES), rng.choice(PLACES))
    if scene.relation is None:
        return [(row, column)]
    return [(near, column), (far, column)] if scene.relation == "above" else [(row, near), (row, far)]


def render(
    scene: Scene, generator: torch.Generator | None = None, corners: list[tuple[int, int]] | None = None
) -> Tensor:
    """Render a scene as uint8 [3, SIDE, SIDE]. generator: adds pixel noise. corners: positions, see `places`."""
    image = torch.full((3, SIDE, SIDE), BACKGROUND)
    for thing, (row, column) in zip(scene.things, corners or places(scene), strict=True):
        place = image[:, row : row + SIZE, column : column + SIZE]
        colour = torch.tensor(COLOURS[thing.colour])[:, None, None]
        place.copy_(torch.where(MASKS[thing.kind], colour, place))
    if generator is not None:
        image = image + torch.randn(image.shape, generator=generator) * NOISE
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def held_out_pairs(seed: int) -> frozenset[Thing]:
    """Draw the colour-shape pairs that captions never mention: three colours of every shape."""
    return draw_held_out(seed, tuple(COLOURS), SHAPES)


def all_pairs() -> list[Thing]:
    return [Thing(colour, shape) for shape, colour in itertools.product(SHAPES, COLOURS)]


def draw_scene(rng: random.Random, things: list[Thing]) -> Scene:
    """Draw a scene of one or two objects, with equal probability, each from `things`."""
    if rng.random() < 0.5:
        return Scene((rng.choice(things),))
    return Scene((rng.choice(things), rng.choice(things)), rng.choice(RELATIONS))
