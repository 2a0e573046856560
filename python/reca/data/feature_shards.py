"""Precomputed features of many images in one file."""

import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reca.data.read_ahead import read_ahead
from reca.data.sources.remote import REQUESTS
from reca.io.folders import PART, write_atomically

log = logging.getLogger("reca")

PATTERN = "shard-*.safetensors"
SHARD_BYTES = 2**28  # of features per shard
OPEN = 64  # most shards that stay open
ABANDONED = 3600.0  # seconds without a write after which a partial shard is that of a killed process


class FeatureShards:
    """Reader of features by image address. Tensors of a shard are named ADDRESS/FEATURE.

    The index takes 12 bytes per image. Shards that are written later are not found.
    """

    def __init__(self, folder: Path):
        self.paths: list[Path] = []
        starts: list[np.ndarray[Any, Any]] = []
        paths = sorted(folder.glob(PATTERN))
        for path, found in zip(paths, read_ahead(_starts_of, paths, REQUESTS), strict=True):
            if isinstance(found, Exception):
                log.warning("%s cannot be read (%s): its features are computed again", path, found)
            else:
                starts.append(found)
                self.paths.append(path)
        self.starts = np.concatenate(starts) if starts else np.zeros(0, np.uint64)
        self.shards = np.repeat(np.arange(len(starts), dtype=np.int32), [len(start) for start in starts])
        order = np.argsort(self.starts, kind="stable")
        self.starts, self.shards = self.starts[order], self.shards[order]
        self._opened = lru_cache(maxsize=OPEN)(self._open)

    def __len__(self) -> int:
        return len(self.starts)

    def get(self, address: str) -> dict[str, Tensor] | None:
        """Return an image's features; None if no shard has them."""
        start = np.uint64(_start(address))
        for place in range(*(int(np.searchsorted(self.starts, start, side)) for side in ("left", "right"))):
            try:
                shard, names = self._opened(int(self.shards[place]))
                found = {name: shard.get_tensor(f"{address}/{name}") for name in names.get(address, ())}
            except (OSError, SafetensorError):
                continue
            if found:
                return found
        return None

    def _open(self, number: int) -> tuple[Any, dict[str, list[str]]]:
        shard = safe_open(self.paths[number], "pt")
        names: dict[str, list[str]] = {}
        for key in shard.keys():  # noqa: SIM118 (no mapping)
            address, _, name = key.partition("/")
            names.setdefault(address, []).append(name)
        return shard, names


def features_of(features: dict[str, Any], number: int) -> dict[str, Tensor]:
    """Copy one sample's features of a batch to the host.

    They are cloned, since two names may share a tensor (Harmon's image is its own h_v), which safetensors rejects.
    """
    return {name: value[number].cpu().contiguous().clone() for name, value in features.items()}


def _start(address: str) -> int:
    return int(address[:16], 16)


def _starts_of(path: Path) -> np.ndarray[Any, Any] | Exception:
    """Return the starts of the addresses in a shard, or the error that its reading raises."""
    try:
        with safe_open(path, "pt") as shard:
            addresses = sorted({key.partition("/")[0] for key in shard.keys()})  # noqa: SIM118 (no mapping)
        return np.array([_start(address) for address in addresses], np.uint64)
    except (OSError, SafetensorError) as error:
        return error


def remove_partial(folder: Path) -> None:
    """Remove partial shards of killed processes. Others may be writing to the same folder, so recent ones are kept."""
    for part in folder.glob(f".{PATTERN}.*{PART}"):
        with contextlib.suppress(OSError):  # another rank has removed it, or it belongs to another user
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


class ShardWriter:
    """Writer that collects features and writes a shard, atomically, per SHARD_BYTES; the last one by `write`."""

    def __init__(self, folder: Path):
        self.folder, self.images, self.bytes = folder, 0, 0
        self.waiting: dict[str, Tensor] = {}
        self.waiting_bytes = 0

    def add(self, addresses: Sequence[str], features: dict[str, Any]) -> None:
        """Add a batch's features. Each is a list or tensor whose first dimension is that of `addresses`."""
        for number, address in enumerate(addresses):
            for name, row in features_of(features, number).items():
                self.waiting[f"{address}/{name}"] = row
                self.waiting_bytes += row.nbytes
        self.images += len(addresses)
        if self.waiting_bytes >= SHARD_BYTES:
            self.write()

    def write(self) -> None:
        """Write the collected features as a shard. Raises OSError."""
        if self.waiting:
            path = self.folder / PATTERN.replace("*", uuid.uuid4().hex)
            write_atomically(path, save(self.waiting))
            self.bytes += self.waiting_bytes
            self.waiting, self.waiting_bytes = {}, 0


def fill(
    rows: Iterable[tuple[str, Any]], batch_size: int, encode: Callable[[list[Any]], dict[str, Any]], folder: Path
) -> ShardWriter:
    """Encode rows in batches and write their features. rows: (address, item of the list that `encode` gets).

    Rows with an address seen before are skipped. Return the writer with its counts.
    """
    writer, distinct = ShardWriter(folder), _distinct(rows)
    while batch := list(itertools.islice(distinct, batch_size)):
        with torch.no_grad():
            writer.add([address for address, _ in batch], encode([item for _, item in batch]))
    writer.write()
    return writer


def _distinct(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for address, item in rows:
        if _start(address) not in seen:
            seen.add(_start(address))
            yield address, item
