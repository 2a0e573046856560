"""The tasks that a model trains on, and the texts of their samples."""

from typing import NamedTuple

# Reconstruction from h_v, image to text, text to image, and text to image of scored regions.
TASKS = ("reca", "i2t", "t2i", "srum")


class Turn(NamedTuple):
    """One exchange of a conversation about an image."""

    question: str
    answer: str


class ScoredBox(NamedTuple):
    """A region of an image and how right it is, from -1 to 1. Edges are fractions of the image's width and height."""

    left: float
    top: float
    right: float
    bottom: float
    score: float


class Scored(NamedTuple):
    """What is said of an image that a model has drawn.

    background  score where no box lies
    target      bytes of another image to stay near; None: the image itself
    """

    caption: str
    boxes: tuple[ScoredBox, ...]
    background: float = 0.0
    target: bytes | None = None
