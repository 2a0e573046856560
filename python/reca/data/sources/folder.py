"""Folders of images."""

import os
import posixpath
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from reca.data.errors import DataError
from reca.data.read_ahead import THREADS, read_many
from reca.data.sample import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Sample,
    decode_caption,
    digest,
    hidden,
    suffix_of,
)
from reca.data.sources.remote import AnyPath, read_whole
from reca.data.sources.skipped import Skipped
from reca.io.files import HEAD, packed, placeholder
from reca.io.paths import exists, is_dir, is_file

UNREADABLE = "folders that cannot be read"
METADATA = ("metadata.jsonl", "metadata.csv")  # captions in a folder for `datasets`


class NoImages(DataError):
    """Error for a folder without images. files: suffix -> names of its other files. skipped: by the listing."""

    def __init__(self, message: str, files: Mapping[str, Sequence[str]], skipped: Skipped):
        super().__init__(message)
        self.files, self.skipped = files, skipped


class ImageFolder:
    """Images in a folder and its subfolders, sorted by path. An image's caption is the .txt file of the same name.

    Hidden files are skipped.
    """

    def __init__(self, root: AnyPath, task: str, files: Mapping[str, Sequence[str]], skipped: Skipped):
        """files: suffix -> names of all files that are not hidden. Raises NoImages."""
        self.task, self.skipped = task, skipped
        names = (name for suffix in IMAGE_SUFFIXES for name in files.get(suffix, ()))
        self.names = sorted(names, key=lambda name: name.replace("/", "\0"))  # by parts: no character is below NUL
        if not self.names:
            message = f"{root} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}){holds(files)}"
            raise NoImages(message, files, skipped)
        self.images = len(self.names)  # distinct ones: no two have the same key
        for name in sorted(name for suffix in OTHER_IMAGE_SUFFIXES for name in files.get(suffix, ())):
            skipped.add("images in unsupported formats", name)
        for kind in ("tar", "parquet"):
            for name in sorted(files.get(f".{kind}", ())):
                skipped.add(f"{kind} files in a folder of images", name)
        self.captions = captions_of(root, self.names, files) if task == "t2i" else None
        skipped.warn(str(root))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        text = None
        if self.captions is not None:
            text = decode_caption(self.read(self.captions[index], MAX_CAPTION_BYTES, "caption"))
        return Sample(self.key(index), self.read(self.names[index], MAX_IMAGE_BYTES, "image"), text)

    def read(self, name: str, limit: int, what: str) -> bytes:
        """Read a file of at most `limit` bytes."""
        raise NotImplementedError

    def total_size(self, names: Sequence[str]) -> int:
        """Return the total bytes of files; -1 if one does not exist."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> int:
        return self.total_size([self.names[index]] + ([self.captions[index]] if self.captions is not None else []))

    def identity(self) -> str:
        return digest(zip(self.names, read_many(self.size, range(len(self))), strict=True))


class Folder(ImageFolder):
    """A local folder.

    Links to folders are followed, and each folder is read once. System folders (__MACOSX, @eaDir) are skipped.
    """

    def __init__(self, root: Path, task: str):
        if not is_dir(root):
            raise DataError(_no_folder(root))
        self.root, skipped = root, Skipped()
        super().__init__(root, task, list_files(root, skipped), skipped)

    def read(self, name: str, limit: int, what: str) -> bytes:
        return read_whole(self.root / name, limit, what)

    def total_size(self, names: Sequence[str]) -> int:
        return total_size(self.root / name for name in names)


def _no_folder(path: Path) -> str:
    """Return the message for a path that is not a folder: what it is, and what to give instead."""
    takes = "name a folder of images, .tar or .parquet files, hf:NAME, or package.module:FUNCTION"
    if not is_file(path):
        return f"data folder {path} {'is not a folder' if exists(path) else 'does not exist'}; {takes}"
    with path.open("rb") as file:
        head = file.read(HEAD)
    if cause := placeholder(head) or packed(head):
        return f"{path} {cause}"
    if head.startswith(b"PAR1"):
        return f"{path} is a parquet file with another suffix; rename it to {path.stem}.parquet"
    if suffix_of(path.name) in IMAGE_SUFFIXES:
        return f"{path} is a single file; name its folder"
    if suffix_of(path.name) in (".json", ".jsonl"):
        return (
            f"{path} is not images; conversations are data.conversations (`reca data`: --task i2t), scored images "
            f"data.scored (--task srum). Otherwise {takes}"
        )
    return f"{path} is a file of an unsupported format; {takes}"


def total_size(paths) -> int:
    """Return the total bytes of files; -1 if one does not exist."""
    try:
        return sum(os.stat(path).st_size for path in paths)
    except (OSError, ValueError):
        return -1


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def list_files(root: Path, skipped: Skipped) -> dict[str, list[str]]:
    """Return suffix -> paths relative to `root`, of all files below it. Each folder is read once."""
    files = defaultdict(list)
    for folder, names in walk(root, skipped):
        for name in names:
            files[suffix_of(name)].append(f"{folder}/{name}" if folder else name)
    return files


def walk(root: Path, skipped: Skipped) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and all folders below it, each once, by paths relative to `root`, with the names of its files.

    Links are followed after all real folders, so that files get the path of their folder and not that of a link.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        yield from _walk(root, skipped, pool)


def _walk(root: Path, skipped: Skipped, pool: ThreadPoolExecutor) -> Iterator[tuple[str, list[str]]]:
    """Yield folders as `walk`. A folder is read in the pool from when it is found."""
    seen = set()
    waiting = deque([("", False, pool.submit(_read_folder, root))])
    links: deque[tuple[str, bool, Future]] = deque()
    while waiting or links:
        folder, linked, reading = waiting.popleft() if waiting else links.popleft()
        try:
            place, entries = reading.result()
            if linked and place in seen:
                skipped.add("links to a folder that is already read", folder)
                continue
            seen.add(place)
        except OSError as error:
            if not folder or not isinstance(error, PermissionError | FileNotFoundError):
                raise DataError(f"data folder {root / folder} cannot be read: {error.strerror}") from error
            skipped.add(UNREADABLE, f"{folder}, {error.strerror}")
            continue
        files = []
        for entry, (is_folder, regular) in zip(entries, read_many(_entry_type, entries), strict=True):
            name = f"{folder}/{entry.name}" if folder else entry.name
            suffix = suffix_of(name)
            if hidden(entry.name):
                if is_folder or suffix in IMAGE_SUFFIXES:
                    skipped.add("hidden files and folders", name)
            elif is_folder:
                found = name, linked or entry.is_symlink(), pool.submit(_read_folder, root / name)
                (links if entry.is_symlink() else waiting).append(found)
            elif not regular:
                if suffix in IMAGE_SUFFIXES:
                    skipped.add("images that are not files, or broken links", name)
            else:
                files.append(entry.name)
        yield folder, files


def _read_folder(path: Path) -> tuple[tuple[int, int], list[os.DirEntry]]:
    """Return what identifies a folder wherever it is linked, and its entries by name."""
    status = os.stat(path)
    with os.scandir(path) as found:
        return (status.st_dev, status.st_ino), sorted(found, key=lambda entry: entry.name)


def _entry_type(entry: os.DirEntry) -> tuple[bool, bool]:
    """Return whether an entry is a folder, and whether it is a file; neither for a broken link."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:
        return False, False


def captions_of(root: AnyPath, images: Sequence[str], files: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the caption file of every image. Raises DataError if one is missing or ambiguous."""
    captions: dict[str, str] = {}
    for name in sorted(files.get(".txt", ())):
        if _stem(name) in captions:
            raise DataError(f"{root}: {captions[_stem(name)]} and {name} are captions of one name: remove one")
        captions[_stem(name)] = name
    bare = [name for name in images if _stem(name) not in captions]
    if bare:
        missing = f"{str(root).rstrip('/')}/{_stem(bare[0])}.txt"
        raise DataError(
            f"{len(bare)} of {len(images)} images have no caption; {missing} is missing{_other_captions(root, files)}"
        )
    owners: dict[str, str] = {}
    for name in images:
        if (other := owners.setdefault(_stem(name), name)) != name:
            raise DataError(
                f"{root}: {other} and {name} have the same caption file, {captions[_stem(name)]}: rename or remove "
                "one of them"
            )
    return [captions[_stem(name)] for name in images]


def _other_captions(root: AnyPath, files: Mapping[str, Sequence[str]]) -> str:
    """Describe captions in forms that other trainers read, for the error message."""
    tables = (name for suffix in (".jsonl", ".csv") for name in files.get(suffix, ()))
    if isinstance(root, Path) and (found := [name for name in tables if posixpath.basename(name) in METADATA]):
        return f". To read those in {min(found)}, name the folder hf:{root}"
    if count := len(files.get(".caption", ())):
        return f". Rename its {count} .caption files to .txt"
    return ""


def holds(files: Mapping[str, Sequence[str]]) -> str:
    """Describe the files of a folder without images, for the error message."""
    if not files:
        return ""
    most = sorted(files, key=lambda suffix: -len(files[suffix]))[:5]
    counts = ", ".join(f"{len(files[suffix])} x {suffix or 'no suffix'}" for suffix in most)
    hint = ": name its tars as FOLDER/*.tar" if ".tar" in files else ""
    if hint and ".parquet" in files:
        hint += ", or its tables as FOLDER/*.parquet"
    return f", only {counts}{hint}"
