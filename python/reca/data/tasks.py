"""Training tasks, and the text types of their samples."""

from typing import NamedTuple

# Reconstruction from h_v, image to text, text to image, and text to image with scored regions.
TASKS = ("reca", "i2t", "t2i", "srum")


class Captions(tuple[str, ...]):
    """Several captions of one image. Training draws one each time it reads the image."""


class Turn(NamedTuple):
    """One exchange of a conversation about an image."""

    question: str
    answer: str


class ScoredBox(NamedTuple):
    """A region of an image and its score, from -1 (wrong) to 1 (right). Edges are fractions of width and height."""

    left: float
    top: float
    right: float
    bottom: float
    score: float


class Scored(NamedTuple):
    """Caption and scores of a generated image.

    background  score outside of all boxes
    target      bytes of another image to stay close to; None: the image itself
    """

    caption: str
    boxes: tuple[ScoredBox, ...]
    background: float = 0.0
    target: bytes | None = None
