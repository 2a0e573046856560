"""The optimizer that a recipe names, over the trained parameters."""

from typing import Any

import torch
from torch import nn

from reca.config.recipe import OptimConfig
from reca.models.base import Adapter
from reca.optim import moments
from reca.optim.adamw import AdamW
from reca.optim.gradients import HALVES
from reca.options.fields import RecipeError


def make_optimizer(adapter: Adapter, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """Build the optimizer over the trained parameters, in two groups: with and without weight decay.

    seed: seed of stochastic rounding.
    """
    decayed: list[tuple[str, nn.Parameter]] = []
    plain: list[tuple[str, nn.Parameter]] = []
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            (decayed if adapter.decays(name, parameter) else plain).append((name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named], "names": [name for name, _ in named], "weight_decay": decay}
        for named, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if named
    ]
    if _needs_own(config, [p for _, p in (*decayed, *plain)]):
        return AdamW(groups, config, seed)
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    common: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.name == "apex":
        return _begun(apex_adam()(groups, adam_w_mode=True, **common), config)
    fused = all(p.is_cuda or p.device.type == "cpu" for group in groups for p in group["params"])
    return _begun(torch.optim.AdamW(groups, fused=fused, **common), config)


def check_apex(adapter: Adapter, config: OptimConfig, ranks: int) -> None:
    """Raise RecipeError or ValueError if optim.name=apex cannot train the model, or not on this machine."""
    if config.name != "apex":
        return
    apex_adam()
    if ranks > 1:
        raise RecipeError(
            f"optim.name=apex does not support DTensors, which the parameters are with {ranks} processes: set "
            "optim.name=adamw, which is also fused"
        )
    if any(p.requires_grad and p.dtype in HALVES for p in adapter.parameters()):
        raise RecipeError(
            "optim.name=apex rounds updates of 16-bit weights to nearest, which loses small ones: set "
            "model.dtype=fp32, or optim.name=adamw, which rounds them stochastically"
        )


def _begun(optimizer: torch.optim.Optimizer, config: OptimConfig) -> torch.optim.Optimizer:
    """Create the state of every parameter as before the first step.

    torch and apex create it at a parameter's first gradient. Some parameters never get one, but checkpoints contain the
    states of all. apex counts steps per group.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = moments.storage(parameter.shape, parameter.dtype, config)
            state = {name: torch.zeros_like(parameter, dtype=kept) for name in moments.MOMENTS}
            if config.name != "apex":
                place = parameter.device if group["fused"] else "cpu"
                state = {"step": torch.zeros((), dtype=torch.float32, device=place), **state}
            optimizer.state[parameter] = state
    return optimizer


def _needs_own(config: OptimConfig, parameters: list[nn.Parameter]) -> bool:
    """Tell whether torch's AdamW falls short: its moments have the parameters' dtype and device, rounded to nearest."""
    if config.name == "apex":
        return False
    if config.name == "adamw_8bit" or config.offload or config.fused_backward:
        return True
    return any(p.dtype in HALVES or moments.storage(p.shape, p.dtype, config) != p.dtype for p in parameters)


def apex_adam() -> type:
    """Import NVIDIA apex's FusedAdam. PyPI's `apex` is an unrelated package, without `amp_C`.

    Raises ValueError if it cannot be imported.
    """
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            "optim.name=apex needs NVIDIA apex built with its CUDA extensions (github.com/NVIDIA/apex), which cannot "
            f"be imported ({error}); PyPI's package named apex is unrelated. Install it, or set optim.name=adamw"
        ) from error
    return FusedAdam
