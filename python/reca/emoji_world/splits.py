"""Splits of the emoji world: every thing as the image that prompts ask for, and as images that differ from it."""

from functools import lru_cache

from torch import Tensor

from reca.demo.scene import Scene, Thing, draw_held_out
from reca.demo.splits import Split
from reca.emoji_world.artwork import HUES, KINDS, MIDDLE, THINGS, View, draw

UNTOLD = 3  # colours of every kind that are never named
VARIED = 2  # images of a thing that understanding learns to name, beside that in the middle
SIZES, SHIFT, GROUNDS = (0.74, 0.94), 0.05, (8, 48)  # of the others


def held_out(seed: int, untold: int = UNTOLD) -> frozenset[Thing]:
    """Draw the pairs of colour and kind that are never named: `untold` colours of every kind."""
    return draw_held_out(seed, tuple(HUES), KINDS, untold)


class Images(Split):
    """Images of things: every one in `views`, and `varied` more that differ in place, size and ground, in a row.

    grain: of those that differ.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        things: tuple[Thing, ...],
        views: tuple[View, ...] = (MIDDLE,),
        varied: int = 0,
        grain: int = 1,
    ):
        self.of_each = len(views) + varied
        super().__init__(name, seed, self.of_each * len(things))
        self.things, self.views, self.grain = things, views, grain
        self.png = lru_cache(maxsize=None)(self.png)  # type: ignore[method-assign]

    def scene(self, index: int) -> Scene:
        return Scene((self.things[index // self.of_each],))

    def image(self, index: int) -> Tensor:
        thing, rng = self.things[index // self.of_each], self.rng(index)
        if (view := index % self.of_each) < len(self.views):
            return draw(thing, self.views[view])
        shift = rng.uniform(-SHIFT, SHIFT), rng.uniform(-SHIFT, SHIFT)
        size, ground = rng.uniform(*SIZES), (rng.randint(*GROUNDS), rng.randint(*GROUNDS), rng.randint(*GROUNDS))
        return draw(thing, View(size, shift, ground, self.grain))


@lru_cache(maxsize=4)
def captioned(seed: int, views: tuple[View, ...] = (MIDDLE,), untold: int = UNTOLD) -> Split:
    """Make the split that pre-training learns to draw from captions: without held-out pairs."""
    return Images("captioned", seed, _seen(seed, untold), views)


@lru_cache(maxsize=4)
def understood(seed: int, views: tuple[View, ...] = (MIDDLE,), untold: int = UNTOLD) -> Split:
    """Make the split that the understanding side learns to name: without held-out pairs, either."""
    return Images("understood", seed, _seen(seed, untold), views, VARIED, views[0].grain)


@lru_cache(maxsize=4)
def unlabeled(seed: int, views: tuple[View, ...] = (MIDDLE,)) -> Split:
    """Make the split of post-training: with every pair. RECA gets images alone; SFT gets captions too."""
    return Images("unlabeled", seed, THINGS, views)


@lru_cache(maxsize=4)
def unseen(seed: int, grain: int = 1) -> Split:
    """Make the split that no training sees, for measuring understanding: every pair, moved, on another ground."""
    return Images("unseen", seed, THINGS, (), 1, grain)


def _seen(seed: int, untold: int) -> tuple[Thing, ...]:
    held = held_out(seed, untold)
    return tuple(thing for thing in THINGS if thing not in held)
