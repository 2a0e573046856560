"""Activation checkpointing (train.activation_checkpointing): blocks that are computed again in the backward pass.

Chen et al. 2016, arXiv 1604.06174: all blocks, or every N-th. Selective: the outputs of matrix products, convolutions
and attention are kept, which are nearly all of a block's FLOPs, and norms, activations and rotary positions are
computed again (Korthikanti et al. 2022, arXiv 2205.05198). None of them changes a bit of a result.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from reca.config import TrainConfig
from reca.models.base import Adapter
from reca.options import RecipeError
from reca.precision import autocast

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm"}
ATTENTION = ("attention", "attn")  # in the names of operators, of torch and of FlashAttention's packages


def checkpoint_activations(adapter: Adapter, config: TrainConfig, compiled: bool = False) -> None:
    """Run the blocks a second time in the backward pass, as the recipe asks.

    compiled: the blocks are. Dynamo does not look into checkpointing, and inside of compiled code nothing can be chosen
    by operator. There the compiler itself keeps the outputs of products and fuses the rest into what needs it.
    Raises RecipeError for every N-th block of fewer than N.
    """
    asked, blocks = config.activation_checkpointing, adapter.blocks()
    selective = asked == "selective"
    if not asked or (selective and compiled):
        return
    every = 1 if selective else int(asked)
    if every > len(blocks):
        raise RecipeError(
            f"train.activation_checkpointing={every} computes one in {every} blocks a second time, and {adapter.name} "
            f"has {len(blocks)}: give a number up to {len(blocks)}, or true for all of them"
        )
    for block in blocks[every - 1 :: every]:
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=_contexts(selective, config.precision, selective or not adapter.repeats_blocks()),
        )


def _contexts(selective: bool, precision: str, uncached: bool) -> Callable[[], tuple[Any, Any]]:
    """Return what makes the contexts of a block's first and second run.

    uncached: autocast keeps no copy of a weight beyond its product. It would keep those of all blocks for the forward
    pass, from which the second run takes none. A weight that is used once has the same gradient either way.
    """

    def contexts() -> tuple[Any, Any]:
        first: AbstractContextManager = contextlib.nullcontext()
        second: AbstractContextManager = contextlib.nullcontext()
        if selective:
            first, second = create_selective_checkpoint_contexts(_policy)
        if uncached:
            first, second = _both(_without_cast_cache(), first), _both(_without_cast_cache(), second)
        if precision == "fp64":  # torch knows of autocast and repeats it, but of no other context
            second = _both(autocast(precision, torch.device("cpu")), second)
        return first, second

    return contexts


@contextlib.contextmanager
def _without_cast_cache() -> Iterator[None]:
    """Let autocast cast weights anew, and keep no copy.

    Selective recomputation counts operators, and a cast from a block's earlier call would be missing: Harmon's encoder
    runs twice in a forward pass, and by itself in the backward pass.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().lower().split("::")[-1].split(".")[0]
    keep = name in PRODUCTS or any(part in op.name().lower() for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield
