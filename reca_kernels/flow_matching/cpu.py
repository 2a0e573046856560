"""Flow matching on CPUs: csrc/cpu/flow_matching.cpp."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox
from reca_kernels.philox.cpu import address


def prepare(images: list[Tensor], t: Tensor, noise: Philox | Tensor, patch: int, out: Tensor) -> None:
    native.module.flow_matching_prepare(_arguments(images, t, noise, patch), native.DTYPES[out.dtype], out.data_ptr())


def losses(pred: Tensor, images: list[Tensor], noise: Philox | Tensor, patch: int, gradient: Tensor | None) -> Tensor:
    sums = torch.empty(len(images), dtype=torch.float32, device=pred.device)
    native.module.flow_matching_loss(
        _arguments(images, None, noise, patch),
        native.DTYPES[pred.dtype],
        pred.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        sums.data_ptr(),
    )
    return sums


def _arguments(images: list[Tensor], t: Tensor | None, noise: Philox | Tensor, patch: int) -> Any:
    """The native struct. It holds addresses only: the tensors must outlive the call."""
    places, offset = [], 0
    for image in images:
        places.append((image.data_ptr(), image.shape[1], image.shape[2], offset))
        offset += image.numel()
    return native.module.FlowMatching(
        native.DTYPES[images[0].dtype],
        places,
        images[0].shape[0],
        patch,
        0 if t is None else t.data_ptr(),
        *address(noise),
        torch.get_num_threads(),
    )
