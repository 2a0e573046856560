"""A synthetic world of coloured shapes, in which a CPU pre-trains and post-trains a tiny model within minutes.

Recipes name its data: `reca.toy_world:unlabeled?seed=0` makes a source, `reca.toy_world:TEMPLATES` is its sentences.
"""

from reca.demo.captions import TEMPLATES, vocabulary
from reca.toy_world import splits
from reca.toy_world.scenes import COLOURS, RELATIONS, SHAPES
from reca.toy_world.source import ToySource

__all__ = ["TEMPLATES", "WORDS", "captioned", "understood", "unlabeled", "unseen"]

WORDS = vocabulary((*COLOURS, *SHAPES, *RELATIONS))


def captioned(task: str, *, seed: int = 0, caption_detail: str = "full") -> ToySource:
    """Make a source of the images that pre-training draws from captions. See `ToySource` for the arguments."""
    return ToySource(splits.captioned, task, seed, caption_detail)


def understood(task: str, *, seed: int = 0, caption_detail: str = "full") -> ToySource:
    """Make a source of the images that the understanding side is trained on."""
    return ToySource(splits.understood, task, seed, caption_detail)


def unlabeled(task: str, *, seed: int = 0, caption_detail: str = "full", size: int | None = None) -> ToySource:
    """Make a source of the images of post-training. size: take the first ones only."""
    return ToySource(splits.unlabeled, task, seed, caption_detail, size)


def unseen(task: str, *, seed: int = 0, caption_detail: str = "full") -> ToySource:
    """Make a source of images that no training sees."""
    return ToySource(splits.unseen, task, seed, caption_detail)
