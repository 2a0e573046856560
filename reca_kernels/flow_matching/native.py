"""Flow matching in C++ and CUDA: csrc/flow_matching."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.flow_matching.runs import image_count, image_runs
from reca_kernels.philox.address import Philox
from reca_kernels.philox.native import address, explicit


def add_noise(batches: list[Tensor], t: Tensor, noise: Philox | Tensor, patch: int, out: Tensor) -> None:
    numbers = explicit(noise)
    native.kernels().flow_matching_add_noise(
        _arguments(batches, t, noise, numbers, patch),
        image_runs(batches),
        native.DTYPES[out.dtype],
        out.data_ptr(),
        native.launch(out),
    )


def losses(pred: Tensor, batches: list[Tensor], noise: Philox | Tensor, patch: int, gradient: Tensor | None) -> Tensor:
    module = native.kernels()
    count = image_count(batches)
    sums = torch.empty(count, dtype=torch.float32, device=pred.device)
    partial = torch.empty(pred.numel() // module.flow_tile + count, dtype=torch.float64, device=pred.device)
    numbers = explicit(noise)
    module.flow_matching_loss(
        _arguments(batches, None, noise, numbers, patch),
        image_runs(batches),
        native.DTYPES[pred.dtype],
        pred.data_ptr(),
        native.address(gradient),
        sums.data_ptr(),
        partial.data_ptr(),
        native.launch(pred),
    )
    return sums


def _arguments(
    batches: list[Tensor], t: Tensor | None, noise: Philox | Tensor, numbers: Tensor | None, patch: int
) -> tuple[object, ...]:
    """Return a FlowMatching (csrc/flow_matching/op.h)."""
    elements = sum(batch.numel() for batch in batches)
    return (
        native.DTYPES[batches[0].dtype],
        batches[0].shape[1],
        patch,
        native.address(t),
        address(noise),
        native.address(numbers),
        tiles_per_block(elements // native.kernels().flow_tile),
    )


def tiles_per_block(tiles: int) -> int:
    """Return the number of tiles per thread block.

    Small inputs need enough blocks to fill the GPU. For large inputs partial sums should be few, because one block adds
    them up. The number depends on sizes only, so sums are bit-identical on every GPU.
    """
    return min(max(tiles // 4096, 1), 32)
