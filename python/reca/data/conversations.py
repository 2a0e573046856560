"""LLaVA-style JSON: questions and answers about images."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.data.batch import Turn
from reca.data.errors import DataError
from reca.data.folder import total_size
from reca.data.sample import MAX_IMAGE_BYTES, Sample, checked_size, digest
from reca.data.skipped import Skipped
from reca.data.text import decode_text, encodable
from reca.files import HEAD, packed, placeholder

IMAGE = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
LINES = (".jsonl", ".ndjson")  # of files that hold one row a line
FORM = '{"image": NAME, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}'


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, as the end of "N rows ..."."""


class Row(NamedTuple):
    image: str  # below the image root, without ".."
    turns: tuple[Turn, ...]


class Conversations:
    """A list of {"image": name, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}.

    A .jsonl holds one such row a line. Names of other chat formats are read too: "images" of one image, "messages"
    of "role" and "content".
    A question is what "human" (or "user") says, its answer what "gpt" (or "assistant") says behind it. A "system" turn
    in front becomes the beginning of the first question. One `<image>` may stand in the first question, and is removed.
    Rows of any other form are left out and counted by reason when the file is opened.
    """

    def __init__(self, path: Path, image_root: str | None):
        if not path.is_file():
            fault = "is no file" if path.exists() else "does not exist"
            raise DataError(
                f"conversations file {path} {fault}; give a LLaVA-style .json or .jsonl as data.conversations"
            )
        self.root = Path(image_root) if image_root else path.parent
        items = _load(path)
        if not isinstance(items, list) or not any(isinstance(item, dict) for item in items):
            raise DataError(f"{path} is not LLaVA-style: expected a list of {FORM}")
        self.rows: list[Row] = []
        self.skipped = Skipped()
        root = os.path.abspath(self.root)
        for number, item in enumerate(items, 1):
            try:
                self.rows.append(Row(_image(item, root), _turns(item, number, self.skipped)))
            except BadRow as error:
                self.skipped.add(str(error), f"row {number}")
        if not self.rows:
            raise DataError(f"{path} holds no conversation about an image: {self.skipped or 'it is empty'}")
        if not self.root.is_dir():
            raise DataError(f"data.image_root {self.root} is no folder; give the one that the image names start from")
        self.skipped.warn(str(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        with (self.root / row.image).open("rb") as file:
            checked_size(os.fstat(file.fileno()).st_size, MAX_IMAGE_BYTES, "image")
            return Sample(row.image, file.read(MAX_IMAGE_BYTES), list(row.turns))

    def key(self, index: int) -> str:
        return self.rows[index].image

    def size(self, index: int) -> int:
        return total_size([self.root / self.rows[index].image])

    def identity(self) -> str:
        sizes: dict[str, int] = {}  # many rows may ask about one image
        for index, row in enumerate(self.rows):
            if row.image not in sizes:
                sizes[row.image] = self.size(index)
        return digest((*row, sizes[row.image]) for row in self.rows)


def _load(path: Path) -> Any:
    try:
        data = path.read_bytes()
        if cause := placeholder(data[:HEAD]) or packed(data[:HEAD]):
            raise DataError(f"conversations file {path} {cause}")
        text = decode_text(data)
        return _lines(text) if path.suffix.lower() in LINES else json.loads(text)
    except OSError as error:
        raise DataError(f"conversations file {path} cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # of json, or of bytes that are no text
        hint = "; of rows one a line the name ends in .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path} is not JSON: {error}{hint}") from error


def _lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}, at its character {error.pos}") from error
    return rows


def _value(item: dict, name: str, other: str) -> Any:
    """What a row or turn has under one of two names. Raises BadRow where they differ."""
    found = [item[key] for key in (name, other) if item.get(key) is not None]
    if len(found) == 2 and found[0] != found[1] and [found[0]] != found[1]:
        raise BadRow(f'have both "{name}" and "{other}", which differ')
    return found[0] if found else None


def _image(item: Any, root: str) -> str:
    """The image's path below `root`. Raises BadRow."""
    if not isinstance(item, dict):
        raise BadRow("are no objects")
    image = _value(item, "image", "images")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is None or image == "" or image == []:
        raise BadRow("have no image")
    if isinstance(image, list):
        raise BadRow("have more than one image")
    if not isinstance(image, str) or "\0" in image or not encodable(image):
        raise BadRow("have an image whose name is no text")
    name, inside = os.path.normpath(os.path.join(root, image)), os.path.join(root, "")
    if not name.startswith(inside) or name == inside:
        raise BadRow("have an image outside data.image_root")
    return name.removeprefix(inside)


def _turns(item: dict, number: int, skipped: Skipped) -> tuple[Turn, ...]:
    """Questions with their answers. Raises BadRow."""
    said = _said(item)
    opening = said.pop(0)[1] if said and said[0][0] == "system" else ""
    # The placeholder may have a turn of its own, in front of the question.
    if len(said) > 1 and said[0][0] == said[1][0] == "human" and said[0][1].strip() == IMAGE:
        said[:2] = [("human", f"{IMAGE}\n{said[1][1]}")]
    if len(said) < 2:
        raise BadRow("have no answer")
    if any(role != ("human", "gpt")[place % 2] for place, (role, _) in enumerate(said)):
        raise BadRow("have turns that do not alternate between human and gpt, human first")
    turns = _pairs([text for _, text in said], opening)
    if len(said) % 2:
        skipped.add("last questions without an answer (the rest of their rows is used)", f"row {number}")
    return turns


def _said(item: dict) -> list[tuple[str, str]]:
    """(role, text) of every turn. Raises BadRow."""
    turns = _value(item, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow("have no conversation")
    said = []
    for turn in turns:
        text = _value(turn, "value", "content") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise BadRow("have a turn whose value is no text")
        role = _value(turn, "from", "role")
        role = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if role is None:
            raise BadRow("have a turn that is neither from human nor from gpt")
        if not encodable(text) or "\0" in text:
            raise BadRow("have a turn with halves of characters or NUL")
        said.append((role, text))
    return said


def _pairs(texts: Sequence[str], opening: str) -> tuple[Turn, ...]:
    """Turns of texts that alternate. opening: what the system says before the first. Raises BadRow."""
    first, *rest = texts
    if first.count(IMAGE) > 1:
        raise BadRow("have more than one <image> for one image")
    if IMAGE in opening or any(IMAGE in text for text in rest):
        raise BadRow("have an <image> behind the first question")
    parts = (opening.strip(), first.replace(IMAGE, "").strip())
    texts = ["\n".join(part for part in parts if part), *(text.strip() for text in rest)]
    if not all(texts[1::2]):
        raise BadRow("have an empty answer")
    return tuple(Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2], strict=False))
