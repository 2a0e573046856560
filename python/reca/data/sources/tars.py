"""Images in webdataset tars: how members are grouped into samples and read."""

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple

from reca.data.errors import BadSample, DataError
from reca.data.read_ahead import read_ahead
from reca.data.sample import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    OTHER_IMAGE_SUFFIXES,
    Sample,
    checked_size,
    decode_caption,
    digest,
)
from reca.data.sources import records
from reca.data.sources.index_files import IndexFile
from reca.data.sources.patterns import relative_names, some
from reca.data.sources.remote import REQUESTS, AnyPath, read_range, reason_of
from reca.data.sources.skipped import Skipped, log_once
from reca.data.sources.tar_index import HEADER, Member, Stored, kept_index
from reca.io.files import parse_json

END = b'", ['  # of the name in the JSON of an Entry


class Entry(NamedTuple):
    """A sample: number of its tar, name of its image, and location of image and caption."""

    shard: int
    name: str
    image: Stored
    text: Stored | None


class Tars:
    """Samples of webdataset tars, read by the offsets of their members.

    The members of a sample are consecutive and share a key: the name up to the first dot after the last slash. The
    image is the member whose whole suffix is that of an image (a.jpg); other members of the key (a.seg.png, a.json)
    are not read. If a key has no such member, but images with dots in their names (v1.5_a.jpg, v1.5_b.jpg), each of
    them is a sample, whose key is the name up to the last dot. A repeated key, a repeated member and a second image of
    a sample are errors. Unused image members are counted.
    The samples of large tars are listed in an index file, from which a rank reads only those it needs.
    """

    def __init__(self, paths: Sequence[AnyPath], task: str):
        self.paths, self.task = list(paths), task
        self.shards = relative_names(paths)
        try:
            index = IndexFile(paths, "samples", task == "t2i")
            kept = index.is_safe and index.is_large
            self.entries, facts = records.kept(index, self._write) if kept else records.in_memory(self._write)
        except OSError as error:
            raise DataError(f"{some(paths)} cannot be read: {reason_of(error, some(paths))}") from error
        self.images = len(self.entries)  # distinct ones: no two have the same key
        self._identity: str = facts["identity"]
        self.skipped = Skipped(*facts["skipped"])
        if not self.entries:
            why = f": skipped {self.skipped}" if self.skipped else ""
            raise DataError(f"no images in {some(paths)}{why}")
        self.skipped.warn(some(paths))

    def _write(self, write: Callable[[bytes], Any]) -> records.Facts:
        """Write an entry per sample, as JSON."""
        skipped = Skipped()

        def described() -> Iterator[tuple[str, int]]:
            shards = read_ahead(_samples, self.paths, REQUESTS)
            for number, (path, (samples, found)) in enumerate(zip(self.paths, shards, strict=True)):
                skipped.merge(found.counts, found.first)
                for sample in samples:
                    if self.task == "t2i" and sample.text is None:
                        raise DataError(f"{path}: {sample.image.name} has no .txt caption, which t2i needs")
                    text = sample.text.stored if sample.text and self.task == "t2i" else None
                    entry = Entry(number, sample.image.name, sample.image.stored, text)
                    write(_encoded(entry))
                    yield self._key(entry), _size(entry)

        return {"identity": digest(described()), "skipped": [skipped.counts, skipped.first]}

    def __len__(self) -> int:
        return len(self.entries)

    def _entry(self, index: int) -> Entry:
        number, name, image, text = parse_json(self.entries[index])
        return Entry(number, name, Stored(*image), text and Stored(*text))

    def _key(self, entry: Entry) -> str:
        return f"{self.shards[entry.shard]}/{entry.name}"

    def __getitem__(self, index: int) -> Sample:
        entry = self._entry(index)
        path = self.paths[entry.shard]
        text = entry.text and decode_caption(_read(path, entry.text, MAX_CAPTION_BYTES, "caption"))
        return Sample(self._key(entry), _read(path, entry.image, MAX_IMAGE_BYTES, "image"), text)

    def key(self, index: int) -> str:
        return self._key(self._entry(index))

    def indices_of(self, keys: Set[str]) -> list[int]:
        """Return the indices of the samples with these keys."""
        shards: dict[str, list[int]] = {}
        for number, name in enumerate(self.shards):
            shards.setdefault(name, []).append(number)
        splits = ((key[:place], key[place + 1 :]) for key in keys for place, letter in enumerate(key) if letter == "/")
        named = ((number, name) for shard, name in splits for number in shards.get(shard, ()))
        heads = {_encoded(Entry(*own, Stored(0, 0, 0), None)).partition(END)[0] for own in named}
        # A name can contain END, so that other names have the same head.
        return [index for index in self.entries.find(heads, END) if self.key(index) in keys]

    def size(self, index: int) -> int:
        return _size(self._entry(index))

    def identity(self) -> str:
        return self._identity


def _encoded(entry: Entry) -> bytes:
    return json.dumps(entry).encode()


def _size(entry: Entry) -> int:
    return entry.image.size + (entry.text.size if entry.text else 0)


class _Sample(NamedTuple):
    key: str
    image: Member
    text: Member | None


def _samples(path: AnyPath) -> tuple[list[_Sample], Skipped]:
    """Return the samples of one tar, and what was skipped. Raises DataError if the grouping is ambiguous."""
    samples: list[_Sample] = []
    skipped = Skipped()
    seen: dict[str, str] = {}  # key -> its first member; likewise dotted and plain
    dotted: dict[str, str] = {}
    plain: dict[str, str] = {}
    for key, members in _groups(path, kept_index(path, skipped)):
        parts = _split(path, key, members)
        for name, group in parts.items():
            if name in seen:
                again = next(iter(group.values())).name
                raise DataError(
                    f"{path}: {again} does not follow {seen[name]}, which has the same key {name!r}. The files of "
                    "a sample must be consecutive, and every sample needs a unique name: pack the tar again "
                    "(tar --sort=name)"
                )
            seen[name] = next(iter(group.values())).name
            image = _image(path, name, group)
            for member in group.values():
                suffix = _last_suffix(member.name)
                if member is not image and suffix in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES:
                    why = "further images of a sample" if image else "images in unsupported formats"
                    skipped.add(why, f"{path}: {member.name}")
            if image:
                samples.append(_Sample(name, image, group.get(".txt")))
                (plain if name == key else dotted).setdefault(key, image.name)
    for key, name in dotted.items():
        if key in plain:
            raise DataError(
                f"{path}: {name} does not follow {plain[key]}. It is ambiguous whether it is a part of sample "
                f"{key!r} or another image: pack the tar again with the parts together, or without the dot"
            )
    if dotted:
        first = next(iter(dotted.values()))
        log_once(logging.INFO, f"{path}: images with dots in their names are separate samples (the first: {first})")
    return samples, skipped


def _groups(path: AnyPath, members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group consecutive members by key, the name up to the first dot. Yield (key, suffix -> member)."""
    key = ""
    group: dict[str, Member] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot:
            continue  # not part of a sample, as in webdataset
        this = f"{folder}/{stem}" if folder else stem
        if this != key:
            if group:
                yield key, group
            key, group = this, {}
        suffix = f".{suffix.lower()}"
        if suffix in group:
            raise DataError(
                f"{path}: {group[suffix].name} and {member.name} are both the {suffix} of sample {key!r}. Pack the "
                "tar again with only one of them, or with different names"
            )
        group[suffix] = member
    if group:
        yield key, group


def _split(path: AnyPath, key: str, group: dict[str, Member]) -> dict[str, dict[str, Member]]:
    """Return key -> suffix -> member: the group as it is, or split at the last dot if no image is named KEY.SUFFIX."""
    if any(suffix in IMAGE_SUFFIXES for suffix in group) or not any(
        _last_suffix(member.name) in IMAGE_SUFFIXES for member in group.values()
    ):
        return {key: group}
    parts: dict[str, dict[str, Member]] = {}
    for member in group.values():
        stem = member.name[: -len(_last_suffix(member.name))]
        parts.setdefault(stem, {})[_last_suffix(member.name)] = member
    return parts


def _image(path: AnyPath, key: str, group: dict[str, Member]) -> Member | None:
    images = [member for suffix, member in group.items() if suffix in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise DataError(
            f"{path}: {images[0].name} and {images[1].name} are both the image of sample {key!r}. Pack the tar again "
            "with only one of them, or with different names"
        )
    return images[0] if images else None


def _last_suffix(name: str) -> str:
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return (dot + suffix).lower()


def _read(path: AnyPath, stored: Stored, limit: int, what: str) -> bytes:
    """Read a member with its header. Raises DataError if the tar was written again since it was indexed."""
    checked_size(stored.size, limit, what)
    length = sum(length for _, length in stored.pieces) if stored.pieces else stored.size
    data = read_range(path, stored.offset - HEADER, HEADER + length)
    if len(data) < HEADER + length:
        raise BadSample(f"{path} is shorter than when the run began")
    header, data = data[:HEADER], data[HEADER:]
    if zlib.crc32(header) != stored.header:
        raise DataError(
            f"{path} has other members than when the run began: there is another {what} at byte {stored.offset}. Put "
            "the old file back to resume the run, or start a new one"
        )
    if not stored.pieces:
        return data
    whole, taken = bytearray(stored.size), 0  # a sparse file: gaps between the pieces are zeros
    for place, length in stored.pieces:
        whole[place : place + length] = data[taken : taken + length]
        taken += length
    if len(whole) != stored.size:
        raise BadSample(f"{path}: the pieces of the sparse {what} at byte {stored.offset} exceed its size")
    return bytes(whole)
