"""The optimizer that a recipe names, over the trained parameters."""

from typing import Any

import torch
from torch import nn

from reca.config import OptimConfig
from reca.models.base import Adapter
from reca.optim import moments
from reca.optim.adamw import AdamW
from reca.optim.gradients import HALVES
from reca.options import RecipeError


def make_optimizer(adapter: Adapter, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """Make the optimizer over the trained parameters, in two groups: with and without weight decay.

    seed: of stochastic rounding.
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
    """Raise RecipeError or ValueError where optim.name=apex cannot train a model: on this machine, or on any."""
    if config.name != "apex":
        return
    apex_adam()
    if ranks > 1:
        raise RecipeError(
            f"optim.name=apex takes whole tensors, and with {ranks} processes the parameters are DTensors: set "
            "optim.name=adamw, which is fused, too"
        )
    if any(p.requires_grad and p.dtype in HALVES for p in adapter.parameters()):
        raise RecipeError(
            "optim.name=apex rounds every step of weights that are kept in 16 bits to nearest, which loses small ones: "
            "set model.dtype=fp32, or optim.name=adamw, which rounds them stochastically"
        )


def _begun(optimizer: torch.optim.Optimizer, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the state of every parameter, as it is before the first step.

    torch and apex make it at a parameter's first gradient. Some parameters get none, and checkpoints hold all states.
    apex counts steps by group.
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
    """Tell whether torch's AdamW will not do: it has moments in type and place of parameters, and rounds to nearest."""
    if config.name == "apex":
        return False
    if config.name == "adamw_8bit" or config.offload or config.fused_backward:
        return True
    return any(p.dtype in HALVES or moments.storage(p.shape, p.dtype, config) != p.dtype for p in parameters)


def apex_adam() -> type:
    """Import NVIDIA apex's FusedAdam. PyPI's `apex` is an unrelated package: `amp_C` tells them apart.

    Raises ValueError where they cannot be imported.
    """
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ValueError(
            "optim.name=apex needs NVIDIA apex built with its CUDA extensions (github.com/NVIDIA/apex), and they "
            f"cannot be imported ({error}); PyPI's package named apex is something else. Use optim.name=adamw"
        ) from error
    return FusedAdam
