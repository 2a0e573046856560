"""Noise schedules of a diffusion process, as a table of coefficients per step."""

import torch
from torch import Tensor

from reca_kernels import checks, compiling
from reca_kernels.diffusion_loss import reference
from reca_kernels.host import indexed, on_device, outside_of_modes

OP = "diffusion_schedule"


def diffusion_schedule(
    steps: int = 1000, kind: str = "cosine", device: torch.device | str = "cpu", keep: int | None = None
) -> Tensor:
    """Return the coefficients of loss and sampler per step, fp32 [steps, 8] or [keep, 8], computed in fp64.

    Columns: sqrt(abar), sqrt(1 - abar), sqrt(1 / abar), sqrt(1 / abar - 1), the posterior mean's coefficients of x0 and
    x_t, log of the posterior variance (that of step 1 for step 0), log beta. keep: the number of steps of a sampler,
    spaced by `space_timesteps`. Raises ValueError for another `kind`, fewer steps than 1 or a `keep` outside
    [1, steps], TypeError for a number of steps that is not whole.
    """
    checks.whole(OP, steps=steps, keep=keep or 0)
    if steps < 1:
        raise ValueError(f"{OP}: steps must be at least 1, got {steps}")
    if kind != "cosine":
        raise ValueError(f"{OP}: kind must be 'cosine', got {kind!r}")
    schedule: Tensor = _constant(steps, keep, torch.device(device))
    # Dynamo cannot tell whether a constant requires a gradient.
    return schedule.detach() if torch.compiler.is_compiling() else schedule


@compiling.assume_constant_result  # the schedule becomes a constant of a compiled graph
def _constant(steps: int, keep: int | None, device: torch.device) -> Tensor:
    schedule: Tensor = _schedule(steps, keep, indexed(device))
    return schedule


@outside_of_modes
def _schedule(steps: int, keep: int | None, device: torch.device) -> Tensor:
    kept = None if keep is None else space_timesteps(steps, keep)
    table = on_device(reference.schedule(steps, kept).float(), device)
    # The effect of mark_static, which cannot be called during tracing: sizes stay static under dynamic=True.
    table._dynamo_static_indices = {0, 1}  # type: ignore[attr-defined]
    return table


def space_timesteps(steps: int, keep: int) -> Tensor:
    """Return `keep` evenly spaced steps of [0, steps) for a sampler, int64 [keep], ascending.

    Raises ValueError if keep is not in [1, steps]. Source: `space_timesteps` of IDDPM (Nichol and Dhariwal 2021).
    """
    checks.whole(OP, steps=steps, keep=keep)
    if not 1 <= keep <= steps:
        raise ValueError(f"{OP}: a sampler keeps 1 to {steps} steps, got {keep}")
    return (torch.arange(keep, dtype=torch.float64) * ((steps - 1) / max(keep - 1, 1))).round().long()
