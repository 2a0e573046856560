"""Cast weights to the compute dtype once per step (train.cast_once), instead of by autocast in every micro-batch.

With gradient accumulation, autocast reads each fp32 weight and writes its bf16 copy in every pass, and each bf16
gradient is cast to an fp32 copy before it is accumulated. The copies made here are autograd leaves, whose gradients are
added to the fp32 ones directly. The result is bit-identical.

Under FSDP2 with whole replicas (ddp) a block's copies are kept over all forward and backward passes of a step; FSDP2 by
itself casts again for each of them. Shards are gathered and cast for every pass as usual, because keeping them gathered
would keep the whole model on each GPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from reca.models.base import Adapter

CAST = (nn.Linear, nn.Conv2d)  # layers whose weights autocast casts, and that only their forward pass reads


def held(
    adapter: Adapter, autocast: torch.autocast | object, passes: int, cast_once: bool = True
) -> AbstractContextManager[None]:
    """Replace weights by copies in autocast's dtype while a step's passes run.

    Applies to the blocks and to a frozen understanding language model.
    passes: number of passes on this rank in the step. A single pass casts only once anyway, except under FSDP2.
    cast_once: TrainConfig.cast_once; False changes nothing.
    """
    if not cast_once:
        return nullcontext()
    if isinstance(adapter, FSDPModule):
        return _fsdp_copies(adapter) if adapter.has_whole_replicas else nullcontext()
    if passes < 2 or (dtype := _dtype_of(autocast)) == torch.float32:
        return nullcontext()
    return _copies(adapter, dtype)


def _dtype_of(autocast: torch.autocast | object) -> torch.dtype:
    """Return the dtype to which a context casts fp32 weights."""
    if not isinstance(autocast, torch.autocast):
        return torch.float32
    with autocast:
        kind = autocast.device
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


@contextmanager
def _copies(adapter: Adapter, dtype: torch.dtype) -> Iterator[None]:
    """Replace the fp32 weights of `_layers` by copies."""
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
    """Keep the copies that FSDP2 makes of the blocks' weights until the end of the step."""
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
            block.reshard()  # also blocks that no backward pass has reached


def _layers(adapter: Adapter) -> list[Any]:
    roles, blocks = adapter.roles(), [layer for block in adapter.blocks() for layer in block.modules()]
    found = [layer for layer in blocks if type(layer) in CAST]
    for name, layer in adapter.named_modules():
        if type(layer) in CAST and not layer.weight.requires_grad and roles.get(f"{name}.weight") == "und_lm":
            found.append(layer)
    read = {  # also read by DoRA, for the row norms
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
