"""Weights cast to the type of a step's products once a step, and not by autocast in every micro-batch.

With gradient accumulation autocast reads each fp32 weight and writes its bf16 copy again in every pass, and a gradient
goes from bf16 to an fp32 copy before it is added up. Held copies are leaves of autograd: their gradients are added to
the fp32 ones directly. All numbers are those of autocast, bit for bit.

Under FSDP2 with whole replicas (ddp) a block's copies live from the forward to the backward pass and over all passes of
a step, where FSDP2 by itself makes them anew for each of both. Shards are gathered and cast for each, as ever: what is
gathered, kept, would be the whole model.
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
def held(adapter: Adapter, autocast: torch.autocast | object, passes: int, cast_once: bool = True) -> Iterator[None]:
    """Hold copies of weights in autocast's type while a step's passes run.

    Of trained blocks and of a frozen language model.
    passes: of the step on this rank. A single one casts once anyway, but not under FSDP2.
    cast_once: of TrainConfig. Without it nothing is held.
    """
    if not cast_once:
        yield
        return
    if isinstance(adapter, FSDPModule) and adapter.has_whole_replicas:
        with _fsdp_copies(adapter):
            yield
        return
    if passes < 2 or isinstance(adapter, FSDPModule) or not isinstance(autocast, torch.autocast):
        yield
        return
    with autocast:
        kind = autocast.device
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    if dtype == torch.float32:
        yield
        return
    layers = [layer for layer in _layers(adapter) if layer.weight.dtype == torch.float32]
    weights = [layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.weight = _copy(layer.weight, dtype)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight


@contextmanager
def _fsdp_copies(adapter: Adapter) -> Iterator[None]:
    """Keep the copies of blocks' weights that FSDP2 makes, to the end of the step."""
    blocks = [block for block in adapter.blocks() if isinstance(block, FSDPModule)]

    def reshard_after_passes(value: bool) -> None:
        for block in blocks:
            block.set_reshard_after_forward(value, recurse=False)
            block.set_reshard_after_backward(value, recurse=False)

    reshard_after_passes(False)
    try:
        yield
    finally:
        reshard_after_passes(True)
        for block in blocks:
            block.reshard()  # also of one that no backward pass has reached


def _layers(adapter: Adapter) -> list[Any]:
    roles, blocks = adapter.roles(), [layer for block in adapter.blocks() for layer in block.modules()]
    found = [layer for layer in blocks if type(layer) in CAST]
    for name, layer in adapter.named_modules():
        if type(layer) in CAST and not layer.weight.requires_grad and roles.get(f"{name}.weight") == "und_lm":
            found.append(layer)
    read = {  # by DoRA, for the norms of rows
        layer
        for module in adapter.modules()
        if getattr(module, "lora_magnitude_vector", ())
        for layer in module.modules()
    }
    return [layer for layer in dict.fromkeys(found) if layer not in read]


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
