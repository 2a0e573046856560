"""The RECA losses as the released trainers formulate them in eager PyTorch, on the modules of this package.

Written for this benchmark from what the releases compute, none of their code is here. Weights, batches and random
numbers are those of our formulation, so that loss and gradients agree (tests/driver/test_step_benchmark.py) and the
comparison is one of how a step is computed. What differs is said at the top of each module.

Common to all: torch.optim.AdamW as the releases construct it, without `fused`.
"""

import importlib
from typing import Any

import torch

from reca.models.base import Adapter

RELEASED = ("show_o", "harmon", "open_uni", "bagel")  # Janus-Pro has no released RECA trainer


def recipe_changes(model: str) -> dict[str, Any]:
    """Return the recipe keys that this form needs: layers are recomputed by its own rule, and BAGEL trains more."""
    changes: dict[str, Any] = {"train.activation_checkpointing": False, "train.compile": False}
    if model == "bagel":  # its understanding expert is frozen by detached activations and stays in the optimizer
        changes["train.train"] = ["gen_lm", "gen_head", "und_lm", "embed"]
    return changes


def formulate(adapter: Adapter, checkpointed: bool) -> None:
    """Give a model the released formulation of its RECA loss, in place. checkpointed: the recipe recomputes layers."""
    if adapter.name not in RELEASED:
        raise ValueError(f"no RECA trainer of {adapter.name} was released; there are {', '.join(RELEASED)}")
    importlib.import_module(f"benchmarks.step.release.{adapter.name}").formulate(adapter, checkpointed)


def make_optimizer(ours: torch.optim.Optimizer) -> torch.optim.AdamW:
    """Return AdamW with its defaults, over the same groups as ours."""
    common = {key: ours.defaults[key] for key in ("lr", "betas", "eps")}
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in ours.param_groups]
    return torch.optim.AdamW(groups, **common)
