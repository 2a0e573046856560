"""Generated images with scores of their regions, the training data of SRUM."""

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from reca.data.errors import BadSample, DataError
from reca.data.pixels import shown_size
from reca.data.read_ahead import read_many
from reca.data.sample import MAX_IMAGE_BYTES, Sample, digest
from reca.data.sources.chat_rows import BadRow, image_name
from reca.data.sources.folder import total_size
from reca.data.sources.json_rows import Form, KeyedRows, kept_rows, keyed
from reca.data.sources.records import Facts, Write
from reca.data.sources.remote import AnyPath, RemotePath, read_whole, to_path
from reca.data.sources.skipped import Skipped
from reca.data.tasks import Scored, ScoredBox
from reca.data.text import encodable
from reca.io.paths import exists, is_file

LARGEST = sys.float_info.max
FORM = Form(
    "file of scored images",
    "of scored images",
    '{"image": NAME, "caption": TEXT, "boxes": [{"box": [LEFT, TOP, RIGHT, BOTTOM], "score": NUMBER}, ...]}',
)


class Row(NamedTuple):
    """One line of the file. Boxes are in pixels."""

    image: str
    caption: str
    boxes: tuple[tuple[tuple[float, float, float, float], float], ...]
    background: float
    target: str | None
    number: int = 0  # of the row in the file


class ScoredImages(KeyedRows):
    """A list of rows {"image", "caption", "boxes", "background", "score", "target"}; a .jsonl has one per line.

    image       name below `image_root`, by default the folder of the file
    boxes       each with a score from -1 (wrong) to 1 (right), and its edges in pixels of the upright image
    background  score outside of all boxes; default 0
    score       of the whole image, from -1 to 1: all scores are multiplied by (score + 1) / 2; default 1
    target      another image of the same shape to stay close to; default: the image itself

    Rows of any other form are skipped and counted by reason when the file is opened.
    """

    def __init__(self, path: AnyPath, image_root: str | None):
        if not is_file(path):
            fault = "is not a file" if exists(path) else "does not exist"
            raise DataError(f"{FORM.file} {path} {fault}; set data.scored to a .json or .jsonl file")
        self.root: AnyPath = to_path(image_root) if image_root else path.parent
        self.rows, facts = kept_rows(path, FORM, _write_rows, "scored")
        self.skipped = Skipped(*facts["skipped"])
        if not self.rows:
            raise DataError(
                f"{path} has no scored image: {self.skipped or 'it is empty'}. Expected rows are {FORM.row}"
            )
        self.images = len(self.rows)  # distinct ones: no two have the same key
        self.skipped.warn(str(path))

    def _row(self, index: int) -> Row:
        image, caption, boxes, *others = self.value(index)
        return Row(image, caption, tuple((tuple(box), score) for box, score in boxes), *others)

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        image = self._read(row.image)
        width, height = shown_size(image)
        boxes = tuple(_fractions(box, score, width, height) for box, score in row.boxes)
        target = None if row.target is None else self._read(row.target)
        return Sample(self.key(index), image, Scored(row.caption, boxes, row.background, target))

    def _read(self, name: str) -> bytes:
        return read_whole(self.root / name, MAX_IMAGE_BYTES, "image")

    def size(self, index: int) -> int:
        """Return the bytes of the row's images; 0 if they are at a URL, -1 if one is missing."""
        if isinstance(self.root, RemotePath):
            return 0
        row = self._row(index)
        return total_size(self.root / name for name in (row.image, row.target) if name is not None)

    def identity(self) -> str:
        rows = (tuple(self._row(index)) for index in range(len(self)))
        if isinstance(self.root, RemotePath):
            return digest((row, 0) for row in rows)
        return digest(zip(rows, read_many(self.size, range(len(self))), strict=True))


def _write_rows(items: Iterable[Any], write: Write) -> Facts:
    """Write the usable rows. Count the others."""
    skipped = Skipped()
    for number, item in enumerate(items, 1):
        try:
            row = _parse(item)._replace(number=number)
        except BadRow as error:
            skipped.add(f"rows that {error}", f"row {number}")
        else:
            write(keyed(f"{row.image}#{number}", row))  # several rows may share an image
    return {"skipped": [skipped.counts, skipped.first]}


def _parse(item: Any) -> Row:
    """Parse a row. Raises BadRow."""
    root = "/images"  # a placeholder: names are relative
    image = image_name(item, root)
    caption = item.get("caption")
    if not isinstance(caption, str) or not caption.strip() or not encodable(caption):
        raise BadRow("have no caption")
    found = item.get("boxes")
    if not isinstance(found, list):
        raise BadRow("have no list of boxes")
    whole = (_score(item.get("score", 1), "score") + 1) / 2
    boxes = tuple((_edges(one), whole * _score(one.get("score"), "score of a box")) for one in map(_mapping, found))
    background = whole * _score(item.get("background", 0), "background")
    target = item.get("target")
    return Row(
        image, caption.strip(), boxes, background, None if target is None else image_name({"image": target}, root)
    )


def _mapping(box: Any) -> dict[str, Any]:
    if not isinstance(box, dict):
        raise BadRow('have a box that is not {"box": [...], "score": ...}')
    return box


def _score(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
        raise BadRow(f"have a {name} that is not a number from -1 to 1")
    return float(value)


def _edges(box: dict[str, Any]) -> tuple[float, float, float, float]:
    edges = box.get("box")
    numbers = edges if isinstance(edges, list) else []
    if len(numbers) != 4 or not all(type(x) in (int, float) and abs(x) <= LARGEST for x in numbers):
        raise BadRow("have a box that is not four numbers")
    left, top, right, bottom = map(float, numbers)
    if left >= right or top >= bottom:
        raise BadRow("have a box whose right is not greater than its left, or bottom than its top")
    return left, top, right, bottom


def _fractions(box: tuple[float, float, float, float], score: float, width: int, height: int) -> ScoredBox:
    """Return a box in fractions of the image size, clipped to the image. Raises BadSample if it is outside."""
    left, right = (min(max(x / width, 0.0), 1.0) for x in box[::2])
    top, bottom = (min(max(y / height, 0.0), 1.0) for y in box[1::2])
    if left >= right or top >= bottom:
        raise BadSample(f"box {[*box]} lies outside the image of {width} x {height} pixels")
    return ScoredBox(left, top, right, bottom, score)
