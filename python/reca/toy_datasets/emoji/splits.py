"""Splits of the emoji datasets: reference images of every thing, and augmented ones."""

from functools import lru_cache

from torch import Tensor

from reca.toy_datasets.emoji.artwork import HUES, KINDS, MIDDLE, THINGS, View, draw
from reca.toy_datasets.scene import Scene, Thing, draw_held_out
from reca.toy_datasets.split import Split

UNTOLD = 3  # held-out colours per kind
VARIED = 2  # augmented images per thing for training understanding
SIZES, SHIFT, GROUNDS = (0.74, 0.94), 0.05, (8, 48)  # ranges of the augmentation


def held_out(seed: int, untold: int = UNTOLD) -> frozenset[Thing]:
    """Draw the colour-kind pairs that captions never name: `untold` colours of every kind."""
    return draw_held_out(seed, tuple(HUES), KINDS, untold)


class Images(Split):
    """Images of every thing: one per view, followed by `varied` images of random position, size and background.

    grain: that of the random images, see `View`.
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
    """Return the split for pre-training of generation from captions. It has no held-out pairs."""
    return Images("captioned", seed, _seen(seed, untold), views)


@lru_cache(maxsize=4)
def understood(seed: int, views: tuple[View, ...] = (MIDDLE,), untold: int = UNTOLD) -> Split:
    """Return the split for training the understanding side. It has no held-out pairs, either."""
    return Images("understood", seed, _seen(seed, untold), views, VARIED, views[0].grain)


@lru_cache(maxsize=4)
def unlabeled(seed: int, views: tuple[View, ...] = (MIDDLE,)) -> Split:
    """Return the split for post-training. It has all pairs. RECA reads only images, SFT captions too."""
    return Images("unlabeled", seed, THINGS, views)


@lru_cache(maxsize=4)
def unseen(seed: int, grain: int = 1) -> Split:
    """Return the split for measuring understanding: all pairs, augmented. It is not used in training."""
    return Images("unseen", seed, THINGS, (), 1, grain)


def _seen(seed: int, untold: int) -> tuple[Thing, ...]:
    held = held_out(seed, untold)
    return tuple(thing for thing in THINGS if thing not in held)
