"""Weights cast to the type of a step's products once a step, and not by autocast in every micro-batch.

With gradient accumulation autocast reads each fp32 weight and writes its bf16 copy again in every pass, and a gradient
goes from bf16 to an fp32 copy before it is added up. Held copies are leaves of autograd: their gradients are added to
the fp32 ones directly. All numbers are those of autocast, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from reca.models.base import Adapter

CAST = (nn.Linear, nn.Conv2d)  # layers whose weights autocast casts, and that nothing but their forward pass reads


@contextmanager
def held(adapter: Adapter, autocast: torch.autocast | object, passes: int) -> Iterator[None]:
    """Hold copies of weights in autocast's type while a step's passes run.

    Of trained blocks and of a frozen language model. FSDP2 casts what it gathers by itself.
    passes: of the step on this rank. A single one casts once anyway.
    """
    if passes < 2 or isinstance(adapter, FSDPModule) or not isinstance(autocast, torch.autocast):
        yield
        return
    with autocast:
        kind = autocast.device
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    layers = [layer for layer in _layers(adapter) if layer.weight.dtype == torch.float32 != dtype]
    weights = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = _copy(layer.weight, dtype)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


def _layers(adapter: Adapter) -> list[Any]:
    roles, blocks = adapter.roles(), [layer for block in adapter.blocks() for layer in block.modules()]
    found = [layer for layer in blocks if type(layer) in CAST]
    for name, layer in adapter.named_modules():
        if type(layer) in CAST and not layer.weight.requires_grad and roles.get(f"{name}.weight") == "und_lm":
            found.append(layer)
    return list(dict.fromkeys(found))


def _copy(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    copy = nn.Parameter(weight.detach().to(dtype), requires_grad=weight.requires_grad)

    def add_to_weight(copy: Tensor) -> None:
        assert copy.grad is not None
        if weight.grad is None:
            weight.grad = copy.grad.to(weight.dtype)
        else:
            weight.grad.add_(copy.grad)
        copy.grad = None

    if weight.requires_grad:
        copy.register_post_accumulate_grad_hook(add_to_weight)
    return copy
