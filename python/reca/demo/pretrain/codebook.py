"""Models that generate codes: a codebook of pixel patches, fitted to images instead of a trained image tokenizer."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.demo.pretrain.optimize import first_images, unit
from reca.models.common.patch_codebook import PatchCodebook
from reca.rng import CounterRNG
from reca.toy_datasets.dataset import ToyDataset


class CodebookTask:
    """Images, codes and random numbers of a pre-training run. Each model subclasses it with its losses.

    codec: the model's codec, fitted here. scale: fraction of the images to use.
    """

    def __init__(self, model: Any, codec: Any, dataset: ToyDataset, seed: int, scale: float):
        self.model, self.rng, self.noise_rng = model, random.Random(seed), CounterRNG(seed)
        self.generation_split, self.caption_split = (dataset.splits[name](seed) for name in ("captioned", "understood"))
        to_generate, self.images = (first_images(split, scale) for split in (self.generation_split, self.caption_split))
        fit_codebook(codec, first_images(dataset.splits[dataset.codec_split](seed), scale)[:3000])
        self.codes = torch.cat([codec.encode(unit(part)) for part in to_generate.split(500)])


def fit_codebook(codec: nn.Module, images: Tensor, rounds: int = 5) -> None:  # uint8 [n, 3, H, W]
    """Fit the codebook by k-means on the pixel patches of images, initialised by farthest-point sampling."""
    assert isinstance(codec, PatchCodebook), "the codec of toy datasets"
    patches = F.unfold(unit(images), codec.factor, stride=codec.factor).transpose(1, 2).flatten(0, 1)
    centres = _far_apart(patches, codec.entries)
    for _ in range(rounds):
        nearest = torch.cdist(patches, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=len(centres)).clamp(min=1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, patches) / counts[:, None]
    codec.codebook.copy_(centres)


def _far_apart(patches: Tensor, count: int) -> Tensor:  # [n, d]
    """Choose patches by farthest-point sampling: [count, d].

    Duplicates of chosen patches are dropped from time to time, as they are not chosen while others are left.
    """
    chosen, difference = [patches[0]], torch.empty_like(patches)
    distance = torch.full((len(patches),), torch.inf)
    while len(chosen) < count:
        torch.sub(patches, chosen[-1], out=difference)
        distance = torch.minimum(distance, difference.square_().sum(1))
        chosen.append(patches[distance.argmax()])
        if len(chosen) % 128 == 0 and (others := distance > 0).any():
            patches, distance = patches[others], distance[others]
            difference = torch.empty_like(patches)
    return torch.stack(chosen)
