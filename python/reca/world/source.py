"""The world as a data source: scenes drawn by index, as PNG bytes with what each task of loss reads beside them."""

import io
import random
from urllib.parse import parse_qsl

import torch
from PIL import Image

from reca.data.errors import DataError
from reca.data.source import Sample, digest
from reca.models.base import Turn
from reca.world.captions import QUESTIONS, caption, phrase
from reca.world.scenes import Scene, Thing, all_pairs, draw_scene, held_out_pairs, render

TOLD = ("sparse", "half", "full")


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

    def picture(self, index: int) -> torch.Tensor:
        """uint8 [3, H, W], with pixel noise."""
        return render(self.scene(index), torch.Generator().manual_seed(self.rng(index, "noise").getrandbits(63)))


def captioned(seed: int) -> Split:
    """Pictures that pre-training draws from captions: no held-out pair among them."""
    held = held_out_pairs(seed)
    return Split("captioned", seed, 8000, [pair for pair in all_pairs() if pair not in held])


def understood(seed: int) -> Split:
    """Pictures that the understanding side has seen and named: every pair."""
    return Split("understood", seed, 8000, all_pairs())


def unlabeled(seed: int) -> Split:
    """Pictures of post-training: every pair. RECA gets them bare; SFT gets them with captions."""
    return Split("unlabeled", seed, 6000, all_pairs())


def unseen(seed: int) -> Split:
    """Pictures that no training sees, for measuring understanding."""
    return Split("unseen", seed, 400, all_pairs())


class WorldSource:
    """A split for one task of loss: bare (reca), with a caption (t2i), or with a question and its answer (i2t)."""

    def __init__(self, split: Split, task: str, told: str):
        self.split, self.task, self.told = split, task, told
        held = held_out_pairs(split.seed)
        self.named = {pair for pair in all_pairs() if pair not in held} if told == "sparse" else None
        self.share = 0.5 if told == "half" else 1.0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        buffer = io.BytesIO()
        Image.fromarray(self.split.picture(index).permute(1, 2, 0).numpy()).save(buffer, "PNG")
        scene, rng, text = self.split.scene(index), self.split.rng(index, "text"), None
        if self.task == "t2i":
            text = phrase(caption(scene, self.named, rng, self.share), rng)
        if self.task == "i2t":
            text = [Turn(rng.choice(QUESTIONS), caption(scene))]
        return Sample(self.key(index), buffer.getvalue(), text)

    def key(self, index: int) -> str:
        return f"{self.split.name}/{index}"

    def size(self, index: int) -> int:
        return 0  # drawn when it is asked for

    def identity(self) -> str:
        return digest([self.split.name, self.split.seed, len(self), self.task, self.told])


SPLITS = {"captioned": captioned, "understood": understood, "unlabeled": unlabeled, "unseen": unseen}


def world_source(spec: str, task: str) -> WorldSource:
    """`SPLIT?seed=N&told=sparse|half|full`. told: whether t2i captions withhold the colours of held-out pairs (sparse),
    tell every colour half the time (half) or always (full, the default). Raises DataError."""
    name, _, query = spec.partition("?")
    options = {"seed": "0", "told": "full"} | dict(parse_qsl(query))
    if name not in SPLITS or options["told"] not in TOLD or not options["seed"].isdigit() or len(options) > 2:
        raise DataError(
            f"world:{spec} is not known; write world:SPLIT?seed=N&told=WHAT with SPLIT one of {', '.join(SPLITS)} and "
            f"WHAT one of {', '.join(TOLD)}"
        )
    return WorldSource(SPLITS[name](int(options["seed"])), task, options["told"])
