"""Splits of the toy dataset `shapes`. Each scene is a function of (seed, split, index)."""

import torch

from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.shapes.scenes import all_pairs, draw_scene, held_out_pairs, places, render
from reca.toy_datasets.split import Split


class Scenes(Split):
    """Scenes of objects from `pairs`. jitter: random positions for every image."""

    def __init__(self, name: str, seed: int, size: int, pairs: list[Thing], jitter: bool = False):
        super().__init__(name, seed, size)
        self.pairs, self.jitter = pairs, jitter

    def scene(self, index: int) -> Scene:
        return draw_scene(self.rng(index), self.pairs)

    def image(self, index: int) -> torch.Tensor:
        """Render an image: uint8 [3, H, W], with pixel noise."""
        scene, noise = self.scene(index), torch.Generator().manual_seed(self.rng(index, "noise").getrandbits(63))
        return render(scene, noise, places(scene, self.rng(index, "places") if self.jitter else None))


def captioned(seed: int, jitter: bool = False) -> Split:
    """Return the split for pre-training of generation from captions. It has no held-out pairs."""
    held = held_out_pairs(seed)
    return Scenes("captioned", seed, 8000, [pair for pair in all_pairs() if pair not in held], jitter)


def understood(seed: int, jitter: bool = False) -> Split:
    """Return the split for training the understanding side. It has all pairs."""
    return Scenes("understood", seed, 8000, all_pairs(), jitter)


def unlabeled(seed: int, jitter: bool = False) -> Split:
    """Return the split for post-training. It has all pairs. RECA reads only images, SFT captions too."""
    return Scenes("unlabeled", seed, 6000, all_pairs(), jitter)


def unseen(seed: int, jitter: bool = False) -> Split:
    """Return the split for measuring understanding. It is not used in training."""
    return Scenes("unseen", seed, 400, all_pairs(), jitter)


SPLITS = {"captioned": captioned, "understood": understood, "unlabeled": unlabeled, "unseen": unseen}
