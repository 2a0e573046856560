"""A codebook of pixel patches: the image tokenizer of the toy datasets, used in place of a trained one."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reca.options.fields import count
from reca.precision import fp32_products


@dataclass
class CodebookSizes:
    """Recipe keys of a PatchCodebook."""

    size: int = count(4, "size in pixels of a patch")
    entries: int = count(145, "codebook entries")


class PatchCodebook(nn.Module):
    """A codebook of p x p pixel patches: the image tokenizer of the toy datasets.

    codebook  fp32 [entries, 3 * p * p], each row a patch [3, p, p] in [-1, 1]; random until it is fitted
    """

    codebook: Tensor

    def __init__(self, sizes: CodebookSizes):
        super().__init__()
        self.factor, self.entries = sizes.size, sizes.entries
        self.register_buffer("codebook", torch.rand(sizes.entries, 3 * sizes.size**2) * 2 - 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:  # [B, 3, H, W] in [-1, 1]
        """Return the codes of the nearest patches, int64 [B, h*w], row-major."""
        patches = F.unfold(pixels.float(), self.factor, stride=self.factor).transpose(1, 2)
        # One matrix of all patches: for a batch of matrices, cdist would copy the codebook per image.
        with fp32_products():
            return torch.cdist(patches.flatten(0, 1), self.codebook).argmin(-1).unflatten(0, patches.shape[:2])

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:  # [B, h*w]
        """Decode codes to pixels [B, 3, H, W] in [-1, 1]. grid: (h, w); None: square."""
        height, width = (side * self.factor for side in grid or square(codes))
        return F.fold(self.codebook[codes].transpose(1, 2), (height, width), self.factor, stride=self.factor)


def square(codes: Tensor) -> tuple[int, int]:  # [B, n]
    """Return the grid (h, w) of a square image's codes."""
    side = math.isqrt(codes.shape[1])
    if side**2 != codes.shape[1]:
        raise ValueError(f"{codes.shape[1]} codes do not form a square grid; pass grid=(h, w)")
    return side, side
