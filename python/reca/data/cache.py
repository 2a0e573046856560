"""Features of the frozen encoders on disk: every image is decoded and encoded once, in the first epoch."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from reca import units
from reca.data.errors import DataError
from reca.data.feature_shards import FeatureShards, features_of
from reca.data.views import Views
from reca.folders import ensure_writable, write_atomically

log = logging.getLogger("reca")

KEPT_BYTES = 2**25  # of features that stay in memory
VERSION = 2  # of all features; raise it when the same views or encoders make others of an image


def content(image: bytes) -> str:
    """Hash the bytes of an image: the address of its features, whatever its path."""
    return hashlib.sha256(image).hexdigest()


class FeatureCache:
    """Features on disk: shards made ahead of time, and one safetensors file for each image met in training.

    The first that are read, of KEPT_BYTES together, stay in memory: small ones take less time than to open a file.

    They lie below a folder named after everything else that they depend on.

    identity: JSON-able; caches of another identity in the same folder are left alone. A checkpoint that changes under
    the same name is not noticed: remove the folder then.
    """

    def __init__(self, folder: Path, views: Views, identity: Any):
        for name, view in (("generation", views.gen), ("understanding", views.und)):
            if view and view.fit == "random_crop":
                raise DataError(
                    f"data.cache keeps one set of features per image, but the {name} view crops at random: the model "
                    "would see one crop for ever. Set data.cache=null"
                )
        text = json.dumps([VERSION, identity, repr(views)], sort_keys=True, default=str)
        self.folder, self.full = folder / hashlib.sha256(text.encode()).hexdigest()[:16], False
        ensure_writable(self.folder, "data.cache")
        self.shards = FeatureShards(self.folder)
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.room = KEPT_BYTES

    def path(self, address: str) -> Path:
        return self.folder / address[:2] / f"{address}.safetensors"

    def get(self, address: str) -> dict[str, Tensor] | None:
        """Read one image's features; None when they are missing or unreadable (a torn file is written again)."""
        found = self.kept.get(address)
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
        """Keep a batch's features, each of which is a list or has a first dim of the images in `addresses`.

        A cache that cannot be written, because its disk is full for example, is read only from then on: the run does
        not need it.
        """
        if self.full:
            return
        for number, address in enumerate(addresses):
            path = self.path(address)
            try:
                path.parent.mkdir(exist_ok=True)
                # save_file would keep colleagues out: mode 0600.
                write_atomically(path, save(features_of(features, number)), sync=False)
            except OSError as error:
                self.full = True
                log.warning(
                    "data.cache %s cannot be written to (%s, %s): no more features are cached, and the run continues "
                    "without. Free some space, or set data.cache=null",
                    *(self.folder, error, _free(self.folder)),
                )
                return


def _free(folder: Path) -> str:
    try:
        return f"{units.size(shutil.disk_usage(folder).free)} free"
    except OSError:
        return "its disk is away"


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Collate features of samples into a batch: stacked where the shapes agree, else a list."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        batch[name] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
    return batch
