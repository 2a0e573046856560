"""Noise schedules of a diffusion process: what loss and sampler need of every step."""

import torch
from torch import Tensor

from reca_kernels.diffusion_loss import reference
from reca_kernels.host import indexed, on_device, outside_of_modes

OP = "diffusion_schedule"


def diffusion_schedule(
    steps: int = 1000, kind: str = "cosine", device: torch.device | str = "cpu", keep: int | None = None
) -> Tensor:
    """Return what loss and sampler need of every step, fp32 [steps, 8] or [keep, 8], computed in fp64.

    Columns: sqrt(abar), sqrt(1 - abar), sqrt(1 / abar), sqrt(1 / abar - 1), the posterior mean's coefficients of x0 and
    x_t, log of the posterior's variance (entry 1 in place of entry 0), log beta. keep: a sampler's steps, those of
    `space_timesteps`.
    """
    if kind != "cosine":
        raise ValueError(f"{OP}: schedule must be 'cosine', got {kind!r}")
    schedule: Tensor = _constant(steps, keep, torch.device(device))
    # Of a constant itself Dynamo cannot say whether it requires a gradient.
    return schedule.detach() if torch.compiler.is_compiling() else schedule


@torch.compiler.assume_constant_result  # a compiled graph holds the schedule
def _constant(steps: int, keep: int | None, device: torch.device) -> Tensor:
    schedule: Tensor = _schedule(steps, keep, indexed(device))
    return schedule


@outside_of_modes
def _schedule(steps: int, keep: int | None, device: torch.device) -> Tensor:
    kept = None if keep is None else space_timesteps(steps, keep)
    table = on_device(reference.schedule(steps, kept).float(), device)
    # What mark_static does, which cannot while a graph is traced: under dynamic=True a constant's sizes are no symbols.
    table._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
    return table


def space_timesteps(steps: int, keep: int) -> Tensor:
    """Return the steps of [0, steps) that a sampler of fewer steps visits, int64 [keep], evenly spaced, ascending.

    Raises ValueError where keep is not in [1, steps]. Source: `space_timesteps` of IDDPM (Nichol and Dhariwal 2021).
    """
    if not 1 <= keep <= steps:
        raise ValueError(f"{OP}: a sampler keeps 1 to {steps} steps, got {keep}")
    return (torch.arange(keep, dtype=torch.float64) * ((steps - 1) / max(keep - 1, 1))).round().long()
