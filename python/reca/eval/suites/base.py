"""What a benchmark answers. One file per benchmark; copying one is the recipe for a new one."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from reca.data.text import encodable
from reca.eval.errors import EvaluationError
from reca.eval.suites import files

PROMPTS = Path(__file__).parents[1] / "prompts"  # of benchmarks whose licence allows to ship them, with their notices
LONGEST_NAME = 255  # bytes of a file's name, on the usual file systems
Key = tuple[str, int]  # of an image: its item, and which of the item's images


@dataclass(frozen=True)
class Item:
    """One prompt, instruction or question.

    id        unique in its suite, and what the seed of its images is made from
    tag       the group it is reported in
    prompt    what the model is given
    source    the image to edit or to ask about
    metadata  what the benchmark's rule needs besides
    """

    id: str
    tag: str
    prompt: str
    source: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def given(self) -> str | None:
        """Hash what the model is given: the prompt, and the source's bytes. None where the source is not there."""
        if self.source is None:
            return _digest([self.prompt])
        return _digest([self.prompt, image_hash(self.source)]) if self.source.is_file() else None

    @functools.cached_property
    def judged(self) -> str | None:
        """Hash what an image is judged by: what the model is given, the tag and the metadata. None as for `given`."""
        return self.given and _digest([self.given, self.tag, self.metadata])


def agree(digest: str | None, other: str | None) -> bool:
    """Tell whether two digests can be of the same; one that is not known contradicts none."""
    return digest is None or other is None or digest == other


def image_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


class Value(NamedTuple):
    """What one image is worth, and why it is not worth more."""

    item: str
    k: int
    tag: str
    value: float
    reason: str = ""


class Score(NamedTuple):
    """Results of a suite.

    values   one per image that was judged
    weights  of the tags in the overall value: sum of weight * mean of the tag. None: all items count alike
    metrics  every figure that the benchmark's own scripts print, by name
    failed   images whose judge's answer holds no mark, with the reason
    """

    values: list[Value]
    weights: dict[str, float] | None
    metrics: dict[str, Any]
    failed: list[tuple[Key, str]]


class Suite:
    """A benchmark: its items, its folder layout, what it asks of a judge, and its rule.

    Class attributes:
        name             in the command
        protocol         the benchmark's own name and version, written to the results
        ability          what the model does: generate, edit or answer
        images_per_item  as the benchmark has it
        judge_kind       which judges can serve it: "detector", "vlm", "world" or "rule" (the model's own answers)
        exact_models     names of local models that are that judge
        exact_judge      the judge that the published numbers were made with, for a message
        unit             of the values: fraction, percent or points
        data_help        where the benchmark's files are, for a message; None: it needs none
        shipped          the file or folder of the benchmark that comes with this package, if one does
    """

    name: ClassVar[str]
    protocol: str
    ability: ClassVar[str] = "generate"
    images_per_item: ClassVar[int] = 1
    judge_kind: ClassVar[str] = "vlm"
    exact_judge: ClassVar[str] = ""
    exact_models: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "fraction"
    data_help: ClassVar[str | None] = None
    shipped: ClassVar[Path | None] = None

    def __init__(self, data: Path | None = None):
        """Take the file or folder of the benchmark that the user has."""
        self.data = data

    def data_path(self) -> Path:
        """Return the user's file or folder, or what is shipped. Raises EvaluationError with where to get it."""
        if self.data is None and self.shipped is not None:
            return self.shipped
        if self.data is None:
            raise EvaluationError(f"{self.name} needs the benchmark's files: --data PATH. {self.data_help}")
        if not self.data.exists():
            raise EvaluationError(f"--data {self.data} does not exist. {self.data_help}")
        return self.data

    def read_lines(self, path: Path, item: Callable[[Any], Item | None]) -> list[Item]:
        """Make an item of every line of a JSON-lines file; None leaves a row out.

        Raises EvaluationError that names the line.
        """
        found = []
        for number, line in enumerate(files.read_lines(path, self.data_help), 1):
            if not line.strip():
                continue
            try:
                found.append(item(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise EvaluationError(f"{path}, line {number}: {error!r}. {self.data_help}") from error
        return [one for one in found if one is not None]

    def items(self) -> list[Item]:
        """List all items, in the benchmark's order."""
        raise NotImplementedError

    def group(self, item: Item) -> str:
        """Name what an item cannot be scored without: by default itself."""
        return item.id

    def items_of_images(self, images: Path, partial: bool = False) -> list[Item]:
        """List the items that a folder of images describes by itself; none, where the layout does not.

        Raises EvaluationError where they may be a part of the list that was generated, unless a part is enough.
        """
        return []

    def sampling(self, umm: str) -> dict[str, Any]:
        """Return the sampling options that the suite gives a model, under those of the user."""
        return {}

    def path(self, item: Item, k: int) -> str:
        """Return where an image lies in the benchmark's layout, relative to the folder of images."""
        raise NotImplementedError

    def companions(self, item: Item) -> dict[str, str | Path]:
        """Return the other files that the layout has beside the images of an item: name -> text, or file to copy."""
        return {}

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        """Find the images of a folder in the benchmark's layout, whoever made it. By default, one of every item."""
        paths = {(item.id, 0): images / self.path(item, 0) for item in items}
        return {key: path for key, path in paths.items() if path.is_file()}

    def layout(self) -> str:
        """Describe the layout, for messages."""
        example = Item("ITEM", "TAG", "PROMPT")
        return self.path(example, 0)

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        """Ask a judge about an image. Returns its answer, JSON-able, before any rule."""
        raise NotImplementedError

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        """Apply the benchmark's rule to the judge's answers."""
        raise NotImplementedError

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read a result file of the benchmark's own scripts; None where the file is none of them."""
        return None


def find_samples(images: Path, items: Sequence[Item]) -> dict[Key, Path]:
    """Find what GenEval's script finds: folders of digits, and in them names that begin with digits and .png."""
    wanted = {int(item.id): item.id for item in items}
    found: dict[Key, Path] = {}
    for folder in images.iterdir():
        if not (folder.is_dir() and folder.name.isdecimal() and int(folder.name) in wanted):
            continue
        samples = (p for p in (folder / "samples").glob("*.png*") if p.name.split(".png")[0].isdecimal())
        for path in sorted(p for p in samples if p.is_file()):
            found.setdefault((wanted[int(folder.name)], int(path.name.split(".png")[0])), path)
    return found


def check_items(suite: Suite, items: Sequence[Item]) -> None:
    """Check what a benchmark's files make of ids and prompts, before a file is named after one.

    Raises EvaluationError where there are none, for an id that comes twice, a prompt that is no text, and a name that
    no file can have.
    """
    if not items:
        raise EvaluationError(f"{suite.name}: {suite.data or 'its data'} holds no item. {suite.data_help or ''}")
    seen: set[str] = set()
    for item in items:
        where = f"{suite.name}: item {item.id[:80]!r}"
        if item.id in seen:
            raise EvaluationError(f"{where} comes twice, and ids must differ. {suite.data_help or ''}")
        seen.add(item.id)
        if not isinstance(item.prompt, str) or not encodable(item.prompt):
            raise EvaluationError(f"{where} has a prompt that is no text: {item.prompt!r:.80}")
        path = PurePosixPath(suite.path(item, 0))
        if path.is_absolute() or ".." in path.parts or any(not _is_name(part) for part in path.parts):
            raise EvaluationError(f"{where} cannot be the name of a file below the folder of images")


def _is_name(part: str) -> bool:
    return encodable(part) and "\0" not in part and len(part.encode()) <= LONGEST_NAME


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tag_means(values: Iterable[Value]) -> dict[str, float]:
    """Average over the images of every tag; tags in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for value in values:
        groups.setdefault(value.tag, []).append(value.value)
    return {tag: mean(group) for tag, group in groups.items()}
