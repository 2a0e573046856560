"""The interface of benchmarks. To add one, copy the file of an existing one."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from reca.data.text import encodable
from reca.eval import files
from reca.eval.errors import EvaluationError, OptionError
from reca.io.files import parse_json
from reca.io.paths import exists, is_dir, is_file
from reca.options.names import option

PROMPTS = Path(__file__).parents[1] / "prompts"  # prompts whose licence permits redistribution, with the licences
LONGEST_NAME = 255  # maximum bytes of a file name on common file systems
Key = tuple[str, int]  # identifies an image: item id, and index among the item's images


@dataclass(frozen=True)
class Item:
    """One prompt, instruction or question.

    id        unique in its suite; the seeds of its images are derived from it
    tag       group in which it is reported
    prompt    text input of the model
    source    image to edit or to ask about
    metadata  further inputs of the judge and the benchmark's rule
    """

    id: str
    tag: str
    prompt: str
    source: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def input_digest(self) -> str | None:
        """Hash of the model's inputs: the prompt and the bytes of the source. None if the source does not exist."""
        if self.source is None:
            return _digest([self.prompt])
        return _digest([self.prompt, image_hash(self.source)]) if is_file(self.source) else None

    @functools.cached_property
    def digest(self) -> str | None:
        """Hash of all that images are judged by: `input_digest`, tag and metadata. None if `input_digest` is."""
        return self.input_digest and _digest([self.input_digest, self.tag, self.metadata])


def agree(digest: str | None, other: str | None) -> bool:
    """Tell whether two digests are equal, or either is unknown."""
    return digest is None or other is None or digest == other


def image_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


class Value(NamedTuple):
    """The value of one image, with the reason if it is not the maximum."""

    item: str
    k: int
    tag: str
    value: float
    reason: str = ""


class Score(NamedTuple):
    """Results of a suite.

    values   one per scored image
    weights  weight of each tag: the overall value is the sum of weight * mean of the tag. None: items count equally
    metrics  all metrics that the benchmark's own scripts print, by name
    failed   images for which the judge's answer contains no mark, with the reason
    """

    values: list[Value]
    weights: dict[str, float] | None
    metrics: dict[str, Any]
    failed: list[tuple[Key, str]]


class Suite:
    """A benchmark: its items, its folder layout, its questions to the judge, and its scoring rule.

    Class attributes:
        name             name in `reca eval`
        protocol         the benchmark's own name and version, written to the results
        ability          what the model does: generate, edit or answer
        images_per_item  number of images per item in the benchmark
        judge_kind       supported judges: "detector", "vlm", "toy" or "rule" (applied to the model's own answers)
        exact_models     names of local models that are the judge of the published numbers
        exact_judge      description of the judge of the published numbers, for messages
        unit             unit of the values: fraction, percent or points
        data_help        how to get the benchmark's files, for messages; None: it needs none
        shipped          file or folder of the benchmark in this package, if there is one
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
        """Set the user's file or folder of the benchmark; None: use the shipped one."""
        self.data = data

    @property
    def folder(self) -> str:
        """Return the name of the suite's output folder, one for each choice of its options."""
        return self.name

    def data_path(self) -> Path:
        """Return the user's file or folder, or the shipped one. Raises EvaluationError if there is none."""
        if self.data is None and self.shipped is not None:
            return self.shipped
        if self.data is None:
            raise OptionError(f"{self.name} needs the benchmark's files: {option('data', 'PATH')}. {self.data_help}")
        if not exists(self.data):
            raise EvaluationError(f"{option('data', str(self.data))} does not exist. {self.data_help}")
        return self.data

    def read_lines(self, path: Path, item: Callable[[Any], Item | None]) -> list[Item]:
        """Convert the rows of a JSON-lines file to items. Rows for which `item` returns None are omitted.

        Raises EvaluationError that names the line.
        """
        found = []
        for number, line in enumerate(files.read_lines(path, self.data_help), 1):
            if not line.strip():
                continue
            try:
                found.append(item(parse_json(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise EvaluationError(f"{path}, line {number}: {error!r}. {self.data_help}") from error
        return [one for one in found if one is not None]

    def items(self) -> list[Item]:
        """List all items, in the benchmark's order."""
        raise NotImplementedError

    def group(self, item: Item) -> str:
        """Return the key of the group of items that can only be scored together: by default the item alone."""
        return item.id

    def items_of_images(self, images: Path, partial: bool = False) -> list[Item]:
        """List the items that files next to the images describe; [] if the layout has no such files.

        Raises EvaluationError if the list may be incomplete, unless `partial`.
        """
        return []

    def sampling(self, umm: str) -> dict[str, Any]:
        """Return the suite's default sampling options for a model, which the user's options override."""
        return {}

    def path(self, item: Item, k: int) -> str:
        """Return the path of an image in the benchmark's layout, relative to the images' folder. By default ID.png."""
        return f"{item.id}.png"

    def companions(self, item: Item) -> dict[str, str | Path]:
        """Return the layout's other files for an item: relative path -> text, or file to copy."""
        return {}

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        """Find images in the benchmark's layout, including those of other tools. By default, one per item."""
        paths = {(item.id, 0): images / self.path(item, 0) for item in items}
        return {key: path for key, path in paths.items() if is_file(path)}

    def layout(self) -> str:
        """Describe the layout, for messages."""
        example = Item("ITEM", "TAG", "PROMPT")
        return self.path(example, 0)

    def ask(self, judge: Any, item: Item, image: Path) -> Any:
        """Ask a judge about an image. Return its raw answer, JSON-serialisable, before any rule."""
        raise NotImplementedError

    def score(self, answers: Mapping[Key, Any], items: Sequence[Item]) -> Score:
        """Apply the benchmark's rule to the judge's answers."""
        raise NotImplementedError

    def import_answers(self, path: Path, items: Sequence[Item]) -> dict[Key, Any] | None:
        """Read a result file of the benchmark's own scripts. Return None if it is not one."""
        return None


class RowFolders(Suite):
    """A suite with GenEval's image layout, <row>/samples/<k>.png. Item ids are numbers of rows."""

    def path(self, item: Item, k: int) -> str:
        return f"{item.id}/samples/{k:04d}.png"

    def find(self, images: Path, items: Sequence[Item]) -> dict[Key, Path]:
        """Find the images that GenEval's script finds: <digits>/samples/<digits>.png*."""
        wanted = {int(item.id): item.id for item in items}
        found: dict[Key, Path] = {}
        for folder in images.iterdir():
            if not (is_dir(folder) and folder.name.isdecimal() and int(folder.name) in wanted):
                continue
            samples = (p for p in (folder / "samples").glob("*.png*") if p.name.split(".png")[0].isdecimal())
            for path in sorted(p for p in samples if is_file(p)):
                found.setdefault((wanted[int(folder.name)], int(path.name.split(".png")[0])), path)
        return found


def check_items(suite: Suite, items: Sequence[Item]) -> None:
    """Validate items read from a benchmark's files before files are named after them.

    Raises EvaluationError if there are none, for a repeated id, for a prompt that is not encodable text, and for an
    invalid file name.
    """
    if not items:
        raise EvaluationError(f"{suite.name}: {suite.data or 'its data'} contains no items. {suite.data_help or ''}")
    seen: set[str] = set()
    for item in items:
        where = f"{suite.name}: item {item.id[:80]!r}"
        if item.id in seen:
            raise EvaluationError(f"{where} occurs twice, but ids must be unique. {suite.data_help or ''}")
        seen.add(item.id)
        if not isinstance(item.prompt, str) or not encodable(item.prompt):
            raise EvaluationError(f"{where} has a prompt that is not valid text: {item.prompt!r:.80}")
        path = PurePosixPath(suite.path(item, 0))
        if path.is_absolute() or ".." in path.parts or any(not _is_name(part) for part in path.parts):
            raise EvaluationError(f"{where} has no valid file name in the folder of images; change its id or prompt")


def _is_name(part: str) -> bool:
    return encodable(part) and "\0" not in part and len(part.encode()) <= LONGEST_NAME


def answered(answers: Mapping[Key, Any], items: Sequence[Item]) -> Iterator[tuple[Item, Key, Any]]:
    """Yield the answers about these items, in the order of the items; those about an item in order of their images."""
    groups: dict[str, list[Key]] = {}
    for key in sorted(answers):
        groups.setdefault(key[0], []).append(key)
    for item in items:
        for key in groups.get(item.id, ()):
            yield item, key, answers[key]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tag_means(values: Iterable[Value]) -> dict[str, float]:
    """Return the mean over the images of each tag; tags in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for value in values:
        groups.setdefault(value.tag, []).append(value.value)
    return {tag: mean(group) for tag, group in groups.items()}


def equal_weights(tags: Iterable[str]) -> dict[str, float] | None:
    """Return the weights of `Score` by which every tag counts equally; None without tags."""
    names = list(dict.fromkeys(tags))
    return {tag: 1 / len(names) for tag in names} or None
