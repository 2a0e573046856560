"""What the splits of a world's images have in common."""

import random
from typing import TYPE_CHECKING

from reca.demo.scene import Scene

if TYPE_CHECKING:
    from torch import Tensor


class Split:
    """`size` images that are a function of (seed, name, index)."""

    def __init__(self, name: str, seed: int, size: int):
        self.name, self.seed, self.size = name, seed, size

    def __len__(self) -> int:
        return self.size

    def rng(self, index: int, purpose: str = "scene") -> random.Random:
        return random.Random(f"{self.seed}/{self.name}/{index}/{purpose}")

    def scene(self, index: int) -> Scene:
        """Say what an image shows."""
        raise NotImplementedError

    def image(self, index: int) -> "Tensor":
        """Draw an image: uint8 [3, H, W]."""
        raise NotImplementedError

    def png(self, index: int) -> bytes:
        """Write an image as the bytes of a PNG file."""
        from reca.data.pixels import encode_png  # imports torch

        return encode_png(self.image(index))
