"""A model that draws the prompts of the toy dataset shapes without fault, except those in its list of misses."""

import random

import torch

from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.shapes.prompts import prompts
from reca.toy_datasets.shapes.scenes import SIDE, render

SCENES = {p.text: p.scene for p in prompts(0)}


class Painter(torch.nn.Module):
    """misses: share of images that are left empty, drawn from the image's seed."""

    abilities = frozenset({"generate"})
    made, state = 0, {"step": 2}

    def __init__(self, misses: float = 0.0):
        super().__init__()
        self.misses = torch.nn.Parameter(torch.tensor(misses))

    def generate(self, texts, seeds, **_):
        Painter.made += len(texts)
        return [self.paint(text, seed) for text, seed in zip(texts, seeds, strict=True)]

    def paint(self, text, seed):
        if random.Random(seed).random() < self.misses.item():
            return torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(seed % 2**63)
        scene = SCENES.get(text, Scene((Thing("red", "square"),)))
        return render(scene, generator)
