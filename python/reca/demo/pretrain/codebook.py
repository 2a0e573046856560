"""Models that draw codes: a codebook of pixel patches fitted to images, in place of training an image tokenizer."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.demo.pretrain.optimize import first_images, unit
from reca.models.common.patch_codebook import PatchCodebook
from reca.rng import CounterRNG
from reca.toy_world.splits import captioned, understood


class CodebookTask:
    """Images, codes and random numbers of one pre-training. A model's own subclass has its losses.

    codec: of the model, fitted here. scale: share of the images that are used.
    """

    def __init__(self, model: Any, codec: Any, seed: int, scale: float):
        self.model, self.rng, self.noise_rng = model, random.Random(seed), CounterRNG(seed)
        self.generation_split, self.caption_split = captioned(seed), understood(seed)
        to_generate, self.images = (first_images(split, scale) for split in (self.generation_split, self.caption_split))
        fit_codebook(codec, self.images[:3000])
        self.codes = torch.cat([codec.encode(unit(part)) for part in to_generate.split(500)])


def fit_codebook(codec: nn.Module, images: Tensor, rounds: int = 5) -> None:  # uint8 [n, 3, H, W]
    """Fit the codebook by k-means over the pixel patches of images, started from patches far apart."""
    assert isinstance(codec, PatchCodebook), "the codec of the toy world"
    patches = F.unfold(unit(images), codec.factor, stride=codec.factor).transpose(1, 2).flatten(0, 1)
    chosen = [patches[0]]
    distance = (patches - chosen[0]).square().sum(1)
    while len(chosen) < codec.entries:
        chosen.append(patches[distance.argmax()])
        distance = torch.minimum(distance, (patches - chosen[-1]).square().sum(1))
    centres = torch.stack(chosen)
    for _ in range(rounds):
        nearest = torch.cdist(patches, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=len(centres)).clamp(min=1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, patches) / counts[:, None]
    codec.codebook.copy_(centres)
