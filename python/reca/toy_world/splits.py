"""Splits of the toy world: scenes that are a function of (seed, split, index)."""

import torch

from reca.demo.scene import Scene, Thing
from reca.demo.splits import Split
from reca.toy_world.scenes import all_pairs, draw_scene, held_out_pairs, render


class Scenes(Split):
    """Scenes of things from `pairs`."""

    def __init__(self, name: str, seed: int, size: int, pairs: list[Thing]):
        super().__init__(name, seed, size)
        self.pairs = pairs

    def scene(self, index: int) -> Scene:
        return draw_scene(self.rng(index), self.pairs)

    def image(self, index: int) -> torch.Tensor:
        """Render an image: uint8 [3, H, W], with pixel noise."""
        return render(self.scene(index), torch.Generator().manual_seed(self.rng(index, "noise").getrandbits(63)))


def captioned(seed: int) -> Split:
    """Make the split that pre-training learns to generate from captions: without held-out pairs."""
    held = held_out_pairs(seed)
    return Scenes("captioned", seed, 8000, [pair for pair in all_pairs() if pair not in held])


def understood(seed: int) -> Split:
    """Make the split that the understanding side is trained on: with every pair."""
    return Scenes("understood", seed, 8000, all_pairs())


def unlabeled(seed: int) -> Split:
    """Make the split of post-training: with every pair. RECA gets images alone; SFT gets captions too."""
    return Scenes("unlabeled", seed, 6000, all_pairs())


def unseen(seed: int) -> Split:
    """Make the split that no training sees, for measuring understanding."""
    return Scenes("unseen", seed, 400, all_pairs())
