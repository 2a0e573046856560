"""Flow matching on CUDA devices: csrc/cuda/flow_matching.cu."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox
from reca_kernels.philox.cuda import address


def prepare(images: list[Tensor], t: Tensor, noise: Philox | Tensor, patch: int, out: Tensor) -> None:
    noise = _single(noise)
    native.module.cuda.flow_matching_prepare(
        _arguments(images, t, noise, patch), native.DTYPES[out.dtype], out.data_ptr(), *native.launch(out)
    )


def losses(pred: Tensor, images: list[Tensor], noise: Philox | Tensor, patch: int, gradient: Tensor | None) -> Tensor:
    noise = _single(noise)
    tiles = pred.numel() // native.module.cuda.flow_tile + len(images)
    numbers = torch.empty(len(images) + tiles, dtype=torch.float32, device=pred.device)
    sums, partial = numbers.split((len(images), tiles))
    native.module.cuda.flow_matching_loss(
        _arguments(images, None, noise, patch),
        native.DTYPES[pred.dtype],
        pred.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        sums.data_ptr(),
        partial.data_ptr(),
        *native.launch(pred),
    )
    return sums


def _single(noise: Philox | Tensor) -> Philox | Tensor:
    return noise.float() if isinstance(noise, Tensor) else noise


def _arguments(images: list[Tensor], t: Tensor | None, noise: Philox | Tensor, patch: int) -> Any:
    """The native struct. It holds addresses only: the tensors must outlive the call."""
    return native.module.cuda.FlowMatching(
        native.DTYPES[images[0].dtype],
        runs(images),
        images[0].shape[0],
        patch,
        0 if t is None else t.data_ptr(),
        *address(noise),
        tiles_of_a_block(sum(image.numel() for image in images) // native.module.cuda.flow_tile),
    )


def tiles_of_a_block(tiles: int) -> int:
    """Few in small work, which must fill the chip; many in large work, whose partial sums are added up by one block.

    It depends on sizes alone, so that sums have the same bits on every GPU.
    """
    return min(max(tiles // 4096, 1), 32)


def runs(images: list[Tensor]) -> list[tuple[int, int, int, int]]:
    """(address, images, height, width) of images of one size that lie one after another. A batch is one run."""
    found, expected, size = [], 0, None
    for image in images:
        address, shape = image.data_ptr(), image.shape
        if shape == size and address == expected:
            first, count, height, width = found[-1]
            found[-1] = (first, count + 1, height, width)
        else:
            found.append((address, 1, shape[1], shape[2]))
        expected, size = address + image.numel() * image.element_size(), shape
    return found
