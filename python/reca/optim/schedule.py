"""The learning rate as a function of the step."""

import math

import torch

from reca.config.recipe import OptimConfig


def lr_at(step: int, end: int, config: OptimConfig) -> float:
    """Compute the learning rate of step `step`, counted from 0, for a schedule that ends at step `end`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = max(config.warmup_steps, round(config.stable_fraction * end))
    if config.schedule == "constant" or step < start:
        return config.lr
    done = (step - start) / (end - start) if step < end else 1.0
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
