"""Disk cache for features of the frozen encoders: every image is decoded and encoded once."""

import contextlib
import errno
import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from reca import units
from reca.data.errors import DataError
from reca.data.feature_shards import FeatureShards, features_of, remove_partial
from reca.data.sources.skipped import log_once
from reca.data.views import Views
from reca.io.folders import NotWritable, ensure_writable, write_atomically
from reca.io.paths import is_dir

log = logging.getLogger("reca")

KEPT_BYTES = 2**25  # of features that stay in memory
WAITING = 2  # most batches that wait to be written
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # errors of writing to a folder of others
VERSION = 2  # of all features; increment when the same views or encoders compute different ones


def content(image: bytes) -> str:
    """Return the address of an image's features: the SHA-256 of its bytes, as hex."""
    return hashlib.sha256(image).hexdigest()


class FeatureCache:
    """Features on disk: precomputed shards, and one safetensors file per image encoded during training.

    They are in a subfolder whose name is a hash of everything else that they depend on. The first features that are
    read stay in memory, up to KEPT_BYTES. A thread writes, so that a step does not wait for the disk. In a folder that
    may only be read, existing features are used.

    identity: JSON-serialisable identity of the encoders. Features of other identities in the same folder are ignored.
    spare: returns how many bytes of a folder's disk to leave free; None: none.
    """

    def __init__(self, folder: Path, views: Views, identity: Any, spare: Callable[[Path], int] | None = None):
        for name, view in (("generation", views.gen), ("understanding", views.und)):
            if view and view.fit == "random_crop":
                raise DataError(
                    f"data.cache stores one set of features per image, but the {name} view is a random crop: the model "
                    "would always see the same crop. Set data.cache=null"
                )
        text = json.dumps([VERSION, identity, repr(views)], sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.full = not _writable(self.folder)  # nothing more is written
        self.spare = spare
        if not self.full:
            remove_partial(self.folder)
        self.shards = FeatureShards(self.folder)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.room = KEPT_BYTES
        self.waiting: dict[str, dict[str, Tensor]] = {}  # not on disk yet
        self.jobs: deque[Future[None]] = deque()
        self.pool = ThreadPoolExecutor(1)

    def path(self, address: str) -> Path:
        return self.folder / address[:2] / f"{address}.safetensors"

    def get(self, address: str) -> dict[str, Tensor] | None:
        """Return an image's features; None if they are missing or unreadable, so that they are computed again."""
        found = self.kept.get(address) or self.waiting.get(address)
        if found is None and (found := self._read(address)) is not None:
            self.room -= sum(tensor.nbytes for tensor in found.values())
            if self.room >= 0:
                self.kept[address] = found
        return found

    def _read(self, address: str) -> dict[str, Tensor] | None:
        found = self.shards.get(address)
        if found is not None:
            return found
        try:
            return load_file(self.path(address))
        except (OSError, SafetensorError, ValueError):
            return None

    def put(self, addresses: Sequence[str], features: dict[str, Any]) -> None:
        """Store a batch's features. Each is a list or tensor whose first dimension is that of `addresses`.

        If writing fails, such as on a full disk, nothing more is written and the run continues.
        """
        if self.full:
            return
        rows = {address: features_of(features, number) for number, address in enumerate(addresses)}
        self.waiting |= rows
        self.jobs.append(self.pool.submit(self._write, rows))
        while len(self.jobs) > WAITING:
            self.jobs.popleft().result()

    def flush(self) -> None:
        """Wait until everything is written."""
        while self.jobs:
            self.jobs.popleft().result()

    def _write(self, rows: dict[str, dict[str, Tensor]]) -> None:
        self._leave_spare()
        for address, features in rows.items():
            path = self.path(address)
            try:
                if not self.full:
                    path.parent.mkdir(exist_ok=True)
                    # Not save_file: its mode 0600 would exclude other users.
                    write_atomically(path, save(features), sync=False)
            except OSError as error:
                self.full = True
                log.warning(
                    "data.cache %s cannot be written to (%s, %s): the run continues without caching more features. "
                    "Free some space, or set data.cache=null",
                    *(self.folder, error, _free(self.folder)),
                )
            self.waiting.pop(address, None)

    def _leave_spare(self) -> None:
        if self.full or self.spare is None:
            return
        with contextlib.suppress(OSError):  # that of writing is reported
            need = self.spare(self.folder)
            if need > shutil.disk_usage(self.folder).free:
                self.full = True
                log.warning(
                    "data.cache %s: the run continues without caching more features, as its checkpoints need %s of "
                    "this disk (%s). Free some space, or set data.cache to a folder on another disk",
                    *(self.folder, units.size(need), _free(self.folder)),
                )


def _writable(folder: Path) -> bool:
    """Create the folder if needed. Return False if it may only be read. Raises NotWritable."""
    try:
        ensure_writable(folder, "data.cache")
    except NotWritable as error:
        if getattr(error.__cause__, "errno", None) not in READ_ONLY or not is_dir(folder):
            raise
        log_once(logging.WARNING, f"data.cache {folder} may only be read: the run uses its features and adds none")
        return False
    return True


def _free(folder: Path) -> str:
    try:
        return f"{units.size(shutil.disk_usage(folder).free)} free"
    except OSError:
        return "disk not available"


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Collate features of samples into a batch: stacked if the shapes agree, otherwise as a list."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        batch[name] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
    return batch
