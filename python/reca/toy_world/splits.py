"""Splits of the toy world: scenes that are a function of (seed, split, index)."""

import random

import torch

from reca.demo.scene import Scene, Thing
from reca.toy_world.scenes import all_pairs, draw_scene, held_out_pairs, render


class Split:
    """`size` scenes that are a function of (seed, name, index), each of things from `pairs`."""

    def __init__(self, name: str, seed: int, size: int, pairs: list[Thing]):
        self.name, self.seed, self.size, self.pairs = name, seed, size, pairs

    def __len__(self) -> int:
        return self.size

    def rng(self, index: int, purpose: str = "scene") -> random.Random:
        return random.Random(f"{self.seed}/{self.name}/{index}/{purpose}")

    def scene(self, index: int) -> Scene:
        return draw_scene(self.rng(index), self.pairs)

    def image(self, index: int) -> torch.Tensor:
        """Render an image: uint8 [3, H, W], with pixel noise."""
        return render(self.scene(index), torch.Generator().manual_seed(self.rng(index, "noise").getrandbits(63)))


def captioned(seed: int) -> Split:
    """Make the split that pre-training learns to generate from captions: without held-out pairs."""
    held = held_out_pairs(seed)
    return Split("captioned", seed, 8000, [pair for pair in all_pairs() if pair not in held])


def understood(seed: int) -> Split:
    """Make the split that the understanding side is trained on: with every pair."""
    return Split("understood", seed, 8000, all_pairs())


def unlabeled(seed: int) -> Split:
    """Make the split of post-training: with every pair. RECA gets images alone; SFT gets captions too."""
    return Split("unlabeled", seed, 6000, all_pairs())


def unseen(seed: int) -> Split:
    """Make the split that no training sees, for measuring understanding."""
    return Split("unseen", seed, 400, all_pairs())
