"""Images below a folder at an address, such as s3://bucket/photos."""

import posixpath
from collections import defaultdict

from reca.data.errors import DataError
from reca.data.folder import NoImages, captions_of, holds
from reca.data.remote import RemotePath, read_range
from reca.data.sample import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Sample,
    checked_size,
    decode_caption,
    digest,
    hidden,
)
from reca.data.skipped import Skipped


class RemoteFolder:
    """Images below a folder, in order of their paths, as `Folder` reads them. It is listed once, when it is opened."""

    def __init__(self, root: RemotePath, task: str):
        self.root, self.task, self.skipped = root, task, Skipped()
        try:
            found = root._ask(root.fs.find, root.path, detail=True)
        except OSError as error:
            raise DataError(f"data folder {root} cannot be listed: {error}") from error
        start = root.path.rstrip("/") + "/"
        self.sizes = {name.removeprefix(start): info.get("size") or 0 for name, info in found.items()}
        files = defaultdict(list)
        for name in self.sizes:
            suffix = posixpath.splitext(name)[1].lower()
            if any(map(hidden, name.split("/"))):
                if suffix in IMAGE_SUFFIXES:
                    self.skipped.add("hidden files and folders", name)
                continue
            files[suffix].append(name)
            if suffix in OTHER_IMAGE_SUFFIXES:
                self.skipped.add("images in formats that are not read", name)
        self.names = sorted((n for s in IMAGE_SUFFIXES for n in files.get(s, ())), key=lambda name: name.split("/"))
        if not self.names:
            there = f"{root} holds no images" if self.sizes else f"data folder {root} does not exist, or is empty"
            raise NoImages(there + holds(files), files)
        self.captions = captions_of(root, self.names, sorted(files.get(".txt", ()))) if task == "t2i" else None
        self.skipped.warn(str(root))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        text = None
        if self.captions is not None:
            text = decode_caption(self._read(self.captions[index], MAX_CAPTION_BYTES, "caption"))
        return Sample(self.names[index], self._read(self.names[index], MAX_IMAGE_BYTES, "image"), text)

    def _read(self, name: str, limit: int, what: str) -> bytes:
        return read_range(self.root / name, 0, checked_size(self.sizes[name], limit, what))

    def key(self, index: int) -> str:
        return self.names[index]

    def size(self, index: int) -> int:
        return self.sizes[self.names[index]] + (self.sizes[self.captions[index]] if self.captions is not None else 0)

    def identity(self) -> str:
        return digest((self.key(index), self.size(index)) for index in range(len(self)))
