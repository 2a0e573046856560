"""Splits of the emoji world: every thing as the image that prompts ask for, and as images that differ from it."""

from functools import lru_cache

from torch import Tensor

from reca.demo.scene import Scene, Thing, draw_held_out
from reca.demo.splits import Split
from reca.emoji_world.artwork import HUES, KINDS, THINGS, draw

VIEWS = 3  # images of a thing that understanding learns to name: one in the middle, and others
SIZES, SHIFT, GROUNDS = (0.74, 0.94), 0.05, (8, 48)  # of the others


def held_out(seed: int) -> frozenset[Thing]:
    """Draw the pairs of colour and kind that are never named: three colours of every kind."""
    return draw_held_out(seed, tuple(HUES), KINDS)


class Pictures(Split):
    """Pictures of things, `views` of each in a row.

    varied: which of the views, from the first on, differ in place, size and ground; the others are as they are drawn.
    """

    def __init__(self, name: str, seed: int, things: tuple[Thing, ...], views: int = 1, varied: range = range(0)):
        super().__init__(name, seed, views * len(things))
        self.things, self.views, self.varied = things, views, varied
        self.png = lru_cache(maxsize=None)(self.png)  # type: ignore[method-assign]

    def scene(self, index: int) -> Scene:
        return Scene((self.things[index // self.views],))

    def image(self, index: int) -> Tensor:
        thing, rng = self.things[index // self.views], self.rng(index)
        if index % self.views not in self.varied:
            return draw(thing)
        shift = rng.uniform(-SHIFT, SHIFT), rng.uniform(-SHIFT, SHIFT)
        size, ground = rng.uniform(*SIZES), (rng.randint(*GROUNDS), rng.randint(*GROUNDS), rng.randint(*GROUNDS))
        return draw(thing, size, shift, ground)


def captioned(seed: int) -> Split:
    """Make the split that pre-training learns to draw from captions: without held-out pairs."""
    return Pictures("captioned", seed, _seen(seed))


def understood(seed: int) -> Split:
    """Make the split that the understanding side learns to name: without held-out pairs, either."""
    return Pictures("understood", seed, _seen(seed), VIEWS, range(1, VIEWS))


def unlabeled(seed: int) -> Split:
    """Make the split of post-training: with every pair. RECA gets pictures alone; SFT gets captions too."""
    return Pictures("unlabeled", seed, THINGS)


def unseen(seed: int) -> Split:
    """Make the split that no training sees, for measuring understanding: every pair, moved, on another ground."""
    return Pictures("unseen", seed, THINGS, 1, range(1))


def _seen(seed: int) -> tuple[Thing, ...]:
    held = held_out(seed)
    return tuple(thing for thing in THINGS if thing not in held)
