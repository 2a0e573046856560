"""torch.compile of a model's blocks (train.compile), in regions that a new layout does not compile again.

Attention by a plan stays outside (models/common/planned.py): the plan is the layout, and a graph that held it would be
made anew with every batch. What stands around it is compiled for any number of samples and rows.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from reca.config import TrainConfig
from reca.models.base import Adapter

KINDS = 32  # graphs of one function: of its calls with and without gradient, cache, and single samples, at most 6 seen


def wanted(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether the blocks are compiled. By default on GPUs with Triton, which inductor's kernels are written in.

    Not by default with train.deterministic: inductor chooses among kernels that round differently by their time.
    """
    if config.compile is None:
        return device.type == "cuda" and has_triton() and not config.deterministic
    return config.compile


def compile_blocks(adapter: Adapter, backend: str = "inductor") -> None:
    """Compile the encoders, for the sizes they meet, and the blocks' passes that have a graph for autograd.

    Other passes are left as they are. Sampling would compile again for every layer, as K/V in a cache are numbered by
    layer, until Dynamo gives up. So would wrappers that transformers puts around a layer's forward pass, which all
    its layers share, for each kind of layer: they are taken off.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    for block in adapter.blocks():
        forward = _own_forward(block)
        block.forward = _with_a_graph(forward, torch.compile(forward, backend=backend, dynamic=True))

    for encoder in adapter.encoders():
        encoder.forward = torch.compile(_own_forward(encoder), backend=backend)


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return module.__dict__.get("forward") or types.MethodType(inspect.unwrap(type(module).forward), module)


def _with_a_graph(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
