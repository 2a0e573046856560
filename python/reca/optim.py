"""Trained parameters, AdamW over them, and the learning rate as a function of the step."""

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from reca.config import OptimConfig
from reca.models.base import ROLES, Adapter

HALVES = (torch.float16, torch.bfloat16)


def freeze(adapter: Adapter, roles: list[str] | None, frozen: Sequence[str] = ()) -> list[str]:
    """Leave only parameters of `roles` (None: the adapter's default) trainable, without those whose names match a
    pattern of `frozen`. Returns the trained roles.

    Raises ValueError for a role that does not exist or that this model has no parameters of, for an idle pattern, and
    when nothing is left to train.
    """
    role_of = adapter.roles()
    wanted = sorted(roles if roles is not None else adapter.trainable_roles)
    present = set(role_of.values())
    for role in wanted:
        if role not in ROLES:
            raise ValueError(f"train.train names {role!r}, which is no role; roles are {', '.join(ROLES)}")
        if roles is not None and role not in present:
            raise ValueError(f"{adapter.name} has no parameters of role {role!r}; it has {', '.join(sorted(present))}")
    for pattern in frozen:
        if not any(fnmatch(name, pattern) for name in role_of):
            raise ValueError(f"train.frozen: no parameter matches {pattern!r}; names look like {min(role_of)!r}")
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(role_of[name] in wanted and not any(fnmatch(name, pattern) for pattern in frozen))
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise ValueError("nothing is trained: train.train names no role, or train.frozen matches all that it names")
    return [role for role in wanted if role in present]


def make_optimizer(adapter: Adapter, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer over the trained parameters, in two groups: with and without weight decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            (decayed if adapter.decays(name, parameter) else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.name == "apex":
        return _apex_adam()(groups, adam_w_mode=True, **common)
    fused = all(p.is_cuda or p.device.type == "cpu" for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, fused=fused, **common)


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Compute the learning rate of step `step` (the first is 0) in a run of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or steps
    start = max(config.warmup_steps, int(config.stable_fraction * end))
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def gradient_norm(adapter: nn.Module, max_grad_norm: float | None) -> float:
    """Clip the gradients to a global L2 norm of `max_grad_norm` (None: leave them) and return the norm before.

    Norms are taken in fp32 whatever the gradients are: in fp16 they end at 65504. Waits for the device, since whether
    a step is made depends on the norm.
    """
    parameters = [p for p in adapter.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(
        [torch.linalg.vector_norm(g, dtype=torch.float32) if g.dtype in HALVES else g for g in gradients]
    )
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _apex_adam() -> type:
    """Import NVIDIA apex's FusedAdam. PyPI's `apex` is an unrelated package: `amp_C` tells them apart."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            "optim.name=apex needs NVIDIA apex built with its CUDA extensions (github.com/NVIDIA/apex), which is not "
            "installed; PyPI's package named apex is something else. Use optim.name=adamw"
        ) from error
    return FusedAdam
