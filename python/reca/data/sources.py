"""Where samples come from. A source maps an index to (key, bytes of a picture, text)."""

import glob
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from reca import exits
from reca.models.base import Turn

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


class DataError(ValueError):
    """Data that is not there or not readable."""

    exit_code = exits.DATA


class Sample(NamedTuple):
    key: str  # names the sample in the ledger and the cache
    image: bytes
    text: Any  # None, a caption, or a list of Turn


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def open_source(spec: str, kind: str, image_root: str | None = None) -> Source:
    """The source that `spec` describes.

    kind: with "t2i" every sample must have a caption, with "i2t" a conversation.
    Raises DataError when there is nothing to read.
    """
    if spec.startswith("world:"):
        from reca.world.source import world_source

        return world_source(spec.removeprefix("world:"), kind)
    if kind == "i2t":
        return Conversations(Path(spec).expanduser(), image_root)
    if spec.endswith(".tar") or ".tar" in Path(spec).name:
        return Tars(_expand(spec), kind)
    return Folder(Path(spec).expanduser(), kind)


class Folder:
    """Pictures below a folder, in order of their paths. A caption is the .txt beside a picture."""

    def __init__(self, root: Path, kind: str):
        if not root.is_dir():
            fault = "is no folder" if root.exists() else "does not exist"
            raise DataError(f"data folder {root} {fault}; give a folder of pictures, a .tar, or world:SPLIT")
        self.root, self.kind = root, kind
        self.paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.paths:
            raise DataError(f"{root} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if kind == "t2i":
            bare = [p for p in self.paths if not p.with_suffix(".txt").is_file()]
            if bare:
                raise DataError(
                    f"{len(bare)} of {len(self.paths)} pictures have no caption; {bare[0].with_suffix('.txt')} "
                    "is missing"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        text = path.with_suffix(".txt").read_text().strip() if self.kind == "t2i" else None
        return Sample(str(path.relative_to(self.root)), path.read_bytes(), text)


class Tars:
    """webdataset tars: files of one sample share a name and follow each other. Members are read by offset."""

    def __init__(self, paths: Sequence[Path], kind: str):
        self.kind, self.entries = kind, []
        for path in paths:
            for key, members in _tar_index(path).items():
                image = next((m for suffix, m in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
                text = members.get("txt")
                if image is None:
                    continue
                if kind == "t2i" and text is None:
                    raise DataError(f"{path}: sample {key} has no .txt caption, which t2i needs")
                self.entries.append((path, f"{path.name}/{key}", image, text))
        if not self.entries:
            raise DataError(f"no pictures in {', '.join(map(str, paths))}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        path, key, image, text = self.entries[index]
        caption = _read(path, *text).decode().strip() if self.kind == "t2i" else None
        return Sample(key, _read(path, *image), caption)


class Conversations:
    """LLaVA-style JSON: a list of {"image": name, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}."""

    def __init__(self, path: Path, image_root: str | None):
        if not path.is_file():
            fault = "is no file" if path.exists() else "does not exist"
            raise DataError(f"conversations file {path} {fault}; give a LLaVA-style .json as data.conversations")
        self.root = Path(image_root).expanduser() if image_root else path.parent
        try:
            items = json.loads(path.read_text())
        except ValueError as error:  # of json, or of bytes that are no text
            raise DataError(f"{path} is not JSON: {error}") from error
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DataError(f'{path} is not LLaVA-style: expected a list of {{"image": ..., "conversations": [...]}}')
        self.items = [item for item in items if item.get("image") and len(item.get("conversations", [])) >= 2]
        if not self.items:
            raise DataError(f"{path} holds no conversation about a picture")
        if not self.root.is_dir():
            raise DataError(f"data.image_root {self.root} is no folder; give the one that the picture names start from")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        said = [turn["value"].replace("<image>", "").strip() for turn in item["conversations"]]
        turns = [Turn(question, answer) for question, answer in zip(said[::2], said[1::2], strict=False)]
        return Sample(item["image"], (self.root / item["image"]).read_bytes(), turns)


def _expand(spec: str) -> list[Path]:
    """Paths of a glob or of a {000..009} range. Raises DataError when there are none."""
    names = [spec]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
        first, last = match.groups()
        numbers = range(int(first), int(last) + 1)
        names = [spec[: match.start()] + str(n).zfill(len(first)) + spec[match.end() :] for n in numbers]
    paths = [Path(p) for name in names for p in sorted(glob.glob(str(Path(name).expanduser())))]
    if not paths:
        raise DataError(f"no tar file matches {spec!r}")
    return paths


def _tar_index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Sample name -> suffix -> (offset, size), in the order of the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    name = f"{folder}/{stem}".lstrip("/")
                    samples.setdefault(name, {})[suffix.lower()] = member.offset_data, member.size
    except tarfile.TarError as error:
        raise DataError(f"{path} is not an uncompressed tar: {error}") from error
    return samples


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
