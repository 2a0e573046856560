"""The RECA losses as formulated by the released trainers in eager PyTorch, on the modules of this package.

They were written for this benchmark from what the releases compute and contain none of their code. Weights, batches and
random numbers are those of our formulation, so loss and gradients agree (tests/driver/test_step_benchmark.py), and the
comparison is only about how a step is computed. The docstring of each module lists the differences.

Common to all: torch.optim.AdamW as constructed by the releases, without `fused`.
"""

import importlib
from typing import Any

import torch

from reca.models.base import Adapter

RELEASED = ("show_o", "harmon", "open_uni", "bagel")  # Janus-Pro has no released RECA trainer


def recipe_changes(model: str) -> dict[str, Any]:
    """Return the overrides for this form: it has its own checkpointing, and BAGEL has more trained parameters."""
    changes: dict[str, Any] = {"train.activation_checkpointing": False, "train.compile": False}
    if model == "bagel":  # the understanding expert is frozen by detaching activations but stays in the optimizer
        changes["train.roles"] = ["gen_lm", "gen_head", "und_lm", "embed"]
    return changes


def formulate(adapter: Adapter, checkpointed: bool) -> None:
    """Replace a model's RECA loss by the released formulation, in place.

    checkpointed: whether the recipe uses activation checkpointing.
    """
    if adapter.name not in RELEASED:
        raise ValueError(f"no RECA trainer was released for {adapter.name}; expected one of {', '.join(RELEASED)}")
    importlib.import_module(f"benchmarks.step.release.{adapter.name}").formulate(adapter, checkpointed)


def make_optimizer(ours: torch.optim.Optimizer) -> torch.optim.AdamW:
    """Return AdamW with default settings and the same parameter groups as ours."""
    common = {key: ours.defaults[key] for key in ("lr", "betas", "eps")}
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in ours.param_groups]
    return torch.optim.AdamW(groups, **common)
