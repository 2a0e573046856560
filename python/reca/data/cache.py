"""Features of the frozen encoders, kept on disk: a picture is decoded and encoded once, however many epochs follow."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reca.data.sources import DataError
from reca.data.views import Views
from reca.folders import writable


class FeatureCache:
    """One safetensors file per sample, below a folder named after everything that the features depend on.

    identity: JSON-able; caches of another identity in the same folder are left alone. A checkpoint that changes under
    the same name is not noticed: remove the folder then.
    """

    def __init__(self, folder: Path, views: Views, identity: Any):
        for name, view in (("generation", views.gen), ("understanding", views.und)):
            if view and view.fit == "random_crop":
                raise DataError(
                    f"data.cache keeps one set of features per picture, but the {name} view crops at random: the model "
                    "would see one crop for ever. Set data.cache=null"
                )
        text = json.dumps([identity, repr(views)], sort_keys=True, default=str)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        writable(self.folder, "data.cache")

    def path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """One sample's features, None when they are not there or not readable (a torn file is made again)."""
        try:
            return load_file(self.path(key))
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, keys: Sequence[str], features: dict[str, Any]) -> None:
        """Keep a batch's features, each of which is a list or has a first dim of the samples that `keys` name."""
        for number, key in enumerate(keys):
            path = self.path(key)
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            # Two names may hold one tensor (Harmon's picture is its own h_v), which the format does not take.
            rows = {name: value[number].cpu().contiguous().clone() for name, value in features.items()}
            save_file(rows, part)
            part.replace(path)


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Samples' features as a batch's: stacked where the shapes agree, else a list."""
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        batch[name] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
    return batch
