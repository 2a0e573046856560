"""What is put around the blocks of a model before it trains."""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from reca.models.base import Adapter


def compile_blocks(adapter: Adapter) -> None:
    """Compile the forward pass of every block. Dynamo does not look into recomputation, which comes around it later."""
    for block in adapter.blocks():
        block.forward = torch.compile(block.forward)


def recompute_blocks(adapter: Adapter) -> None:
    """Activation checkpointing: the backward pass runs the blocks again and keeps nothing of them."""
    for block in adapter.blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
