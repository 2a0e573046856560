"""LLaVA-style JSON: questions and answers about images."""

import json
import os
from pathlib import Path
from typing import Any

from reca.data.chat_rows import BadRow, Row, image_name, turns
from reca.data.errors import DataError
from reca.data.folder import total_size
from reca.data.sample import MAX_IMAGE_BYTES, Sample, checked_size, digest
from reca.data.skipped import Skipped
from reca.data.text import decode_text
from reca.files import HEAD, packed, placeholder

LINES = (".jsonl", ".ndjson")  # of files that hold one row a line
FORM = '{"image": NAME, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}'


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
                self.rows.append(Row(image_name(item, root), turns(item, number, self.skipped)))
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
