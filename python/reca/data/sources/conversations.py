"""LLaVA-style JSON: questions and answers about images."""

from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reca.data.errors import DataError
from reca.data.read_ahead import read_many
from reca.data.sample import MAX_IMAGE_BYTES, Sample, digest
from reca.data.sources.chat_rows import BadRow, absolute, image_name, turns
from reca.data.sources.folder import total_size
from reca.data.sources.json_rows import Form, KeyedRows, kept_rows, key_of, keyed
from reca.data.sources.records import Facts, Write
from reca.data.sources.remote import AnyPath, RemotePath, read_whole, to_path
from reca.data.sources.skipped import Skipped
from reca.data.tasks import Turn
from reca.io.paths import exists, is_dir, is_file

FORM = Form(
    "conversations file",
    "LLaVA-style",
    '{"image": NAME, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}',
)


class Conversations(KeyedRows):
    """A list of {"image": name, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}.

    A .jsonl has one such row per line. The keys of other chat formats are supported as well: "images" with one image,
    and "messages" with "role" and "content", where content may be a list of text parts and the image.
    A question is a turn of "human" (or "user"), its answer the next turn, of "gpt" (or "assistant"). A leading "system"
    turn, or the row's "system" key, is prepended to the first question. The first question may contain one `<image>`,
    which is removed.
    Rows of any other form are skipped and counted by reason when the file is opened.

    File and images may be at URLs. A remote file is streamed once, whatever its size; its index is saved if the server
    identifies versions. Sizes of remote images are not read, since each would take a request.
    """

    def __init__(self, path: AnyPath, image_root: str | None):
        if not is_file(path):
            fault = "is not a file" if exists(path) else "does not exist"
            raise DataError(
                f"conversations file {path} {fault}; give a LLaVA-style .json or .jsonl as data.conversations"
            )
        self.root = to_path(image_root) if image_root else path.parent
        self.rows, facts = kept_rows(path, FORM, partial(self._write_rows, path), "rows", absolute(self.root))
        self.images: int = facts["images"]  # number of distinct ones
        self.skipped = Skipped(*facts["skipped"])
        if not self.rows:
            raise DataError(f"{path} has no conversation about an image: {self.skipped or 'it is empty'}")
        if isinstance(self.root, Path) and not is_dir(self.root):
            raise DataError(f"data.image_root {self.root} is not a folder; set the folder that image names start from")
        self.skipped.warn(str(path))

    def _write_rows(self, path: AnyPath, items: Iterable[Any], write: Write) -> Facts:
        """Write the usable rows: the turns, with the image's name as key. Count the others."""
        root, found, skipped, images = absolute(self.root), False, Skipped(), array("q")
        for number, item in enumerate(items, 1):
            found = found or isinstance(item, dict)
            try:
                image, said = image_name(item, root), turns(item, number, skipped)
            except BadRow as error:
                skipped.add(f"rows that {error}", f"row {number}")
                continue
            write(keyed(image, said))
            images.append(hash(image))
        if not found:
            raise FORM.wrong(path)
        distinct = np.unique(np.frombuffer(images, np.int64)).size
        return {"images": distinct, "skipped": [skipped.counts, skipped.first]}

    def __getitem__(self, index: int) -> Sample:
        image = self.key(index)
        said = [Turn(*turn) for turn in self.value(index)]
        return Sample(image, read_whole(self.root / image, MAX_IMAGE_BYTES, "image"), said)

    def size(self, index: int) -> int:
        """Return the bytes of the image; 0 if it is at a URL."""
        return 0 if isinstance(self.root, RemotePath) else total_size([self.root / self.key(index)])

    def identity(self) -> str:
        records = map(self.rows.__getitem__, range(len(self)))
        if isinstance(self.root, RemotePath):
            return digest((record, 0) for record in records)
        root = self.root
        sizes: dict[int, int] = {}  # by hash of the image's name: many rows may share an image

        def with_size(record: bytes) -> tuple[bytes, int]:
            image = key_of(record)
            if hash(image) not in sizes:
                sizes[hash(image)] = total_size([root / image])
            return record, sizes[hash(image)]

        return digest(read_many(with_size, records))
