"""Fitting a codebook of pixel patches to images, in place of training an image tokenizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.models.common.patch_codebook import PatchCodebook
from reca.toy_world.pretrain.optimize import unit


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
