"""Base class of the splits of toy datasets."""

import random
from typing import TYPE_CHECKING

from reca.toy_datasets.scene import Scene

if TYPE_CHECKING:
    from torch import Tensor


class Split:
    """A split of `size` images. Each is a function of (seed, name, index)."""

    def __init__(self, name: str, seed: int, size: int):
        self.name, self.seed, self.size = name, seed, size

    def __len__(self) -> int:
        return self.size

    def rng(self, index: int, purpose: str = "scene") -> random.Random:
        return random.Random(f"{self.seed}/{self.name}/{index}/{purpose}")

    def scene(self, index: int) -> Scene:
        """Return the content of an image."""
        raise NotImplementedError

    def image(self, index: int) -> "Tensor":
        """Render an image: uint8 [3, H, W]."""
        raise NotImplementedError

    def png(self, index: int) -> bytes:
        """Encode an image as PNG."""
        from reca.data.pixels import encode_png  # imports torch

        return encode_png(self.image(index))
