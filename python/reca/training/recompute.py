"""Activation checkpointing (train.activation_checkpointing): blocks are recomputed in the backward pass.

Full: all blocks, or every N-th (Chen et al. 2016, arXiv 1604.06174). Selective: outputs of matrix products,
convolutions and attention, which account for nearly all FLOPs of a block, are saved; norms, activations and rotary
embeddings are recomputed (Korthikanti et al. 2022, arXiv 2205.05198). Results are bit-identical to training without
checkpointing.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from reca.config.recipe import TrainConfig
from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.precision import autocast

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm"}
ATTENTION = ("attention", "attn")  # substrings of the names of attention operators of torch and FlashAttention


def checkpoint_activations(adapter: Adapter, config: TrainConfig, compiled: bool = False) -> None:
    """Apply activation checkpointing to the blocks as the recipe requests.

    compiled: the blocks are compiled. Selective checkpointing is then skipped, because operators cannot be selected
    inside compiled code; the compiler itself saves outputs of matrix products and recomputes what it can fuse.
    Raises RecipeError for every N-th block if there are fewer than N.
    """
    asked, blocks = config.activation_checkpointing, adapter.blocks()
    selective = asked == "selective"
    if not asked or (selective and compiled):
        return
    every = 1 if selective else int(asked)
    if every > len(blocks):
        raise RecipeError(
            f"train.activation_checkpointing={every} recomputes every {every}-th block, but {adapter.name} has only "
            f"{len(blocks)}: set a number up to {len(blocks)}, or true for all of them"
        )
    for block in blocks[every - 1 :: every]:
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=_contexts(selective, config.precision, selective or not adapter.repeats_blocks()),
        )


def _contexts(selective: bool, precision: str, uncached: bool) -> Callable[[], tuple[Any, Any]]:
    """Return a factory of the contexts for a block's forward pass and its recomputation.

    uncached: disable autocast's weight cache. It would keep the cast weights of all blocks during the forward pass, and
    recomputation does not use them. The gradient of a weight that is used once is the same either way.
    """

    def contexts() -> tuple[Any, Any]:
        first: AbstractContextManager = contextlib.nullcontext()
        second: AbstractContextManager = contextlib.nullcontext()
        if selective:
            first, second = create_selective_checkpoint_contexts(_policy)
        if uncached:
            first, second = _both(_without_cast_cache(), first), _both(_without_cast_cache(), second)
        if precision == "fp64":  # checkpoint restores autocast for the recomputation, but not other contexts
            second = _both(autocast(precision, torch.device("cpu")), second)
        return first, second

    return contexts


@contextlib.contextmanager
def _without_cast_cache() -> Iterator[None]:
    """Disable autocast's weight cache inside the context.

    Selective checkpointing matches operators by count, and a cached cast would change the count: Harmon's encoder runs
    twice in a forward pass, where the second run would reuse the casts, but each run is recomputed separately.
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
