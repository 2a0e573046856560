"""Images in webdataset tars: which members make a sample, and how they are read."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from reca.data.errors import BadSample, DataError
from reca.data.patterns import relative_names, some
from reca.data.remote import AnyPath, read_range
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
from reca.data.skipped import Skipped, log_once
from reca.data.tar_index import Member, Stored, kept_index


class Entry(NamedTuple):
    """Location of a sample's image and caption."""

    path: AnyPath
    key: str
    image: Stored
    text: Stored | None


class Tars:
    """Samples of webdataset tars. Members are read by their offset.

    The members of a sample follow each other and have one key: their name up to the first dot of its last part. The
    image is the member whose suffix is an image's alone (a.jpg); others of the key (a.seg.png, a.json) are parts
    that are not read. Images of a key that has no such member have dots in their names (v1.5_a.jpg, v1.5_b.jpg): each
    is a sample, whose key is its name up to the last dot. A key that comes twice, a member that comes twice and a
    second image of one sample are errors; image members that are not used are counted.
    """

    def __init__(self, paths: Sequence[AnyPath], task: str):
        self.task, self.skipped = task, Skipped()
        self.entries: list[Entry] = []
        for path, shard in zip(paths, relative_names(paths), strict=True):
            for sample in _samples(path, self.skipped):
                if task == "t2i" and sample.text is None:
                    raise DataError(f"{path}: {sample.image.name} has no .txt caption, which t2i needs")
                text = sample.text.stored if sample.text and task == "t2i" else None
                self.entries.append(Entry(path, f"{shard}/{sample.image.name}", sample.image.stored, text))
        if not self.entries:
            why = f": left out are {self.skipped}" if self.skipped else ""
            raise DataError(f"no images in {some(paths)}{why}")
        self.skipped.warn(some(paths))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        text = entry.text and decode_caption(_read(entry.path, entry.text, MAX_CAPTION_BYTES, "caption"))
        return Sample(entry.key, _read(entry.path, entry.image, MAX_IMAGE_BYTES, "image"), text)

    def key(self, index: int) -> str:
        return self.entries[index].key

    def size(self, index: int) -> int:
        entry = self.entries[index]
        return entry.image.size + (entry.text.size if entry.text else 0)

    def identity(self) -> str:
        return digest((self.key(index), self.size(index)) for index in range(len(self)))


class _Sample(NamedTuple):
    key: str
    image: Member
    text: Member | None


def _samples(path: AnyPath, skipped: Skipped) -> list[_Sample]:
    """List the samples of one tar. Raises DataError where it is ambiguous which members belong together."""
    samples: list[_Sample] = []
    seen: dict[str, str] = {}  # key -> its first member; likewise dotted and plain
    dotted: dict[str, str] = {}
    plain: dict[str, str] = {}
    for key, members in _groups(path, kept_index(path, skipped)):
        parts = _split(path, key, members)
        for name, group in parts.items():
            if name in seen:
                again = next(iter(group.values())).name
                raise DataError(
                    f"{path}: {again} stands apart from {seen[name]}, which has the key {name!r} too. The files of "
                    "one sample must follow each other, and every sample needs a name of its own: pack the tar again "
                    "(tar --sort=name)"
                )
            seen[name] = next(iter(group.values())).name
            image = _image(path, name, group)
            for member in group.values():
                suffix = _last_suffix(member.name)
                if member is not image and suffix in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES:
                    why = "further images of a sample" if image else "images in formats that are not read"
                    skipped.add(why, f"{path}: {member.name}")
            if image:
                samples.append(_Sample(name, image, group.get(".txt")))
                (plain if name == key else dotted).setdefault(key, image.name)
    for key, name in dotted.items():
        if key in plain:
            raise DataError(
                f"{path}: {name} stands apart from {plain[key]}. It is not clear whether it is a part of sample "
                f"{key!r} or an image of its own: pack the tar again with the parts together, or without the dot"
            )
    if dotted:
        first = next(iter(dotted.values()))
        log_once(logging.INFO, f"{path}: images with dots in their names are samples of their own (the first: {first})")
    return samples


def _groups(path: AnyPath, members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group consecutive members by key, which ends at the first dot: yields (key, suffix -> member)."""
    key = ""
    group: dict[str, Member] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot:
            continue  # no part of a sample, for webdataset too
        this = f"{folder}/{stem}" if folder else stem
        if this != key:
            if group:
                yield key, group
            key, group = this, {}
        suffix = f".{suffix.lower()}"
        if suffix in group:
            raise DataError(
                f"{path}: {group[suffix].name} and {member.name} are both the {suffix} of sample {key!r}: it is not "
                "clear which belongs to it. Pack the tar again with one of them, or with names that differ"
            )
        group[suffix] = member
    if group:
        yield key, group


def _split(path: AnyPath, key: str, group: dict[str, Member]) -> dict[str, dict[str, Member]]:
    """Map key -> suffix -> member: the group as it is, or by names up to the last dot if no image has the key alone."""
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
            f"{path}: {images[0].name} and {images[1].name} are both the image of sample {key!r}: it is not clear "
            "which to train on. Pack the tar again with one of them, or with names that differ"
        )
    return images[0] if images else None


def _last_suffix(name: str) -> str:
    _, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return (dot + suffix).lower()


def _read(path: AnyPath, stored: Stored, limit: int, what: str) -> bytes:
    checked_size(stored.size, limit, what)
    if not stored.pieces:
        data = read_range(path, stored.offset, stored.size)
    else:  # a sparse file: what is not stored is zero
        packed = read_range(path, stored.offset, sum(length for _, length in stored.pieces))
        whole, taken = bytearray(stored.size), 0
        for place, length in stored.pieces:
            whole[place : place + length] = packed[taken : taken + length]
            taken += length
        data = bytes(whole)
    if len(data) != stored.size:
        raise BadSample(f"{path} is shorter than when the run began")
    return data
