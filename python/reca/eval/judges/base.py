"""The interface of judges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from reca.eval.suites import Item, Key, Suite

ImageOrFile = Path | Image.Image


def without_thoughts(text: str) -> str:
    """Remove a model's reasoning, up to </think>, which some servers return as part of the answer."""
    return text.rpartition("</think>")[2]


class JudgeError(RuntimeError):
    """The judge failed on one image; it may succeed on others."""


class Judge:
    """Answers questions about an image.

    A judge implements `shows` (judge_kind "toy"), `detect` ("detector"), or `reply` and `first_token_probability`
    ("vlm").

    Class attributes:
        exact    whether it is the judge of the published numbers
        workers  number of images judged concurrently
        options  settings that affect its answers, besides its name, version and dtype
    """

    exact: bool = False
    workers: int = 1
    name: str
    version: str = "1"
    dtype: str | None = None
    options: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def check(cls, argument: str, **options: Any) -> None:
        """Validate the argument and options without opening the judge. Raises EvaluationError or ValueError."""

    def describe(self) -> dict[str, Any]:
        """Return the description that is written to each record and by which records are matched to a judge."""
        description = {"name": self.name, "version": self.version, "dtype": self.dtype, "exact": self.exact}
        return description | ({"options": dict(self.options)} if self.options else {})

    def judge(self, suite: Suite, item: Item, k: int, image: Path) -> Any:
        """Return the answer that the suite's rule reads. Raises JudgeError."""
        return suite.ask(self, item, image)

    def repeats(self, key: Key, answer: Any) -> bool:
        """Tell whether a recorded answer is still valid. Only a file of answers can have been replaced since."""
        return True

    def cost(self) -> str | None:
        """Return one line about requests, tokens and cost; None if the judge has no usage to report."""
        return None

    def shows(self, image: Path, prompt: Any) -> dict[str, Any]:
        """Judge whether an image shows a prompt of a toy dataset. Return {"correct": bool, "seen": description}."""
        raise NotImplementedError

    def detect(self, image: Path, colored: Mapping[str, int], threshold: float) -> dict[str, list[dict[str, Any]]]:
        """Detect objects: class -> [{"box": [x0, y0, x1, y1], "score", "color"}].

        colored: class -> number of its highest-scoring objects to classify by colour. threshold: their minimum score.
        """
        raise NotImplementedError

    def reply(self, text: str, images: Sequence[ImageOrFile]) -> str:
        """Answer a question about images. The images precede the text in the prompt."""
        raise NotImplementedError

    def first_token_probability(self, text: str, images: Sequence[ImageOrFile], accepted: Sequence[str]) -> float:
        """Return the sum, over the accepted strings, of the probability of each one's first token as the next token."""
        raise NotImplementedError
