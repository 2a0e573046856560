"""Numbers of parameters and FLOPs of a model without weights."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reca.data.batch import Batch
from reca.estimate.meta_model import attention, empty_views
from reca.models.base import ROLES, Adapter
from reca.models.common.on_cpu import as_gpu
from reca.rng import CounterRNG
from reca_kernels import dispatch

TEXT = "Describe the image in detail."


class Parameters(NamedTuple):
    total: int
    trained: int


class Flops(NamedTuple):
    """FLOPs per image of a RECA step. A multiply-add counts as two; attention counts every pair of tokens."""

    encode: float  # frozen encoders; with a feature cache they run only once
    forward: float
    backward: float  # including the recomputation of activation checkpointing


def parameters(adapter: Adapter) -> dict[str, Parameters]:
    """Count the parameters by role, in the order of ROLES."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    role_of = adapter.roles()
    for name, parameter in adapter.named_parameters():
        total[role_of[name]] += parameter.numel()
        trained[role_of[name]] += parameter.numel() * parameter.requires_grad
    return {role: Parameters(total[role], trained[role]) for role in ROLES if role in total}


def flops(adapter: Adapter, fake: FakeTensorMode, images: int) -> Flops:
    """Count the FLOPs per image of a RECA step on a GPU, averaged over `images` images of the views' sizes."""
    with fake:
        gen, und = empty_views(adapter.views("reca"), images)
    return batch_flops(adapter, Batch("reca", torch.arange(images), [TEXT] * images, gen, und), CounterRNG(0))


def without_memory(batch: Batch, fake: FakeTensorMode) -> Batch:
    """Return a batch of the same samples with fake pixels or features of the same shapes."""

    def blank(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty(value.shape, dtype=value.dtype)
        return [blank(item) for item in value] if isinstance(value, list) else value

    with fake:
        gen, und, target = blank(batch.gen), blank(batch.und), blank(batch.target)
        features = batch.features and {key: blank(value) for key, value in batch.features.items()}
    return Batch(batch.task, batch.host_ids, batch.text, gen, und, features, target=target)


def batch_flops(adapter: Adapter, batch: Batch, rng: CounterRNG) -> Flops:
    """Count the FLOPs per sample on a GPU by running a batch's loss on fake tensors.

    Only ids, masks and random numbers are real. A batch that has features is not encoded.
    rng: the task's generator in the run; it draws the masks, and the number of masked tokens determines a head's work.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CONVOLUTIONS)
    with dispatch.use("reference"), attention("auto"), as_gpu(), sdpa_kernel(SDPBackend.MATH), counter:
        made = adapter.encode(batch) if batch.features is None else batch.features
        features = {key: _indices(value) for key, value in made.items()}
        encoded = counter.get_total_flops()
        loss = adapter(replace(batch, features=features), rng).sum
        forward = counter.get_total_flops()
        loss.backward()
        backward = counter.get_total_flops()
    adapter.zero_grad(set_to_none=True)
    return Flops(*(n / len(batch) for n in (encoded, forward - encoded, backward - forward)))


def _convolution_backward(grad, x, weight, *others, **_) -> int:  # the op's arguments, with shapes for tensors
    """Count the FLOPs of a convolution's backward pass with groups, which torch ignores: SANA's are depthwise."""
    transposed, wanted = others[4], others[7]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * (wanted[0] + wanted[1])


CONVOLUTIONS = {torch.ops.aten.convolution_backward: _convolution_backward}


def _indices(feature: Tensor | list) -> Tensor | list:
    """Replace integer features by real zeros: they are codes, which losses use as indices."""
    if not isinstance(feature, Tensor) or feature.is_floating_point():
        return feature
    return torch.zeros(feature.shape, dtype=feature.dtype)
