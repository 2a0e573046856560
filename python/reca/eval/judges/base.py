"""What a judge answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from reca.eval.suites import Item, Key, Suite

ImageOrFile = Path | Image.Image


def without_thoughts(text: str) -> str:
    """Leave out what a model thinks before it answers, which some servers give as a part of the answer."""
    return text.rpartition("</think>")[2]


class JudgeError(RuntimeError):
    """The judge could not answer about one image; others may go well."""


class Judge:
    """Says what it sees on an image. Its kind is which of `shows`, `detect`, and `reply` with its kin it has.

    Class attributes:
        exact    whether it is the judge that the published numbers were made with
        workers  images that it is asked about at once
        options  what decides its answers besides its name, version and dtype
    """

    exact: bool = False
    workers: int = 1
    name: str
    version: str = "1"
    dtype: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def check(cls, argument: str, **options: Any) -> None:
        """Raise EvaluationError or ValueError for what it cannot be opened with, as far as that is known unopened."""

    def describe(self) -> dict[str, Any]:
        """Return what is written to every record, and what a record is looked up by."""
        description = {"name": self.name, "version": self.version, "dtype": self.dtype, "exact": self.exact}
        return description | ({"options": dict(self.options)} if self.options else {})

    def judge(self, suite: Suite, item: Item, k: int, image: Path) -> Any:
        """Return the answer that the suite's rule reads. Raises JudgeError."""
        return suite.ask(self, item, image)

    def repeats(self, key: Key, answer: Any) -> bool:
        """Tell whether it still gives an answer that was recorded of it; only a file that was replaced does not."""
        return True

    def cost(self) -> str | None:
        """Say in a line what was spent; None for a judge that costs nothing but time."""
        return None

    def shows(self, image: Path, prompt: Any) -> dict[str, Any]:
        """Say whether the toy world's prompt is shown: {"correct", "seen"}."""
        raise NotImplementedError

    def detect(self, image: Path, colored: Mapping[str, int], threshold: float) -> dict[str, list[dict[str, Any]]]:
        """Detect objects: class -> [{"box": [x0, y0, x1, y1], "score", "color"}].

        colored: class -> number of its most certain objects whose colour is asked. threshold: scores that count.
        """
        raise NotImplementedError

    def reply(self, text: str, images: Sequence[ImageOrFile]) -> str:
        """Answer a question about images, which come before it."""
        raise NotImplementedError

    def first_token_probability(self, text: str, images: Sequence[ImageOrFile], accepted: Sequence[str]) -> float:
        """Add, over the accepted strings, the probabilities that the answer begins with the first token of one."""
        raise NotImplementedError
