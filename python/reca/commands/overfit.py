"""`reca train RECIPE --overfit N`: a dry run that overfits a single batch and diagnoses a failure to do so.

Every step uses the same samples with the same noise, masks and templates, so that even a diffusion loss can approach
zero. It runs the training code at the recipe's peak learning rate, without warm-up, and does not touch the run folder.
"""

import contextlib
import glob
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from reca import distributed, exits, objective
from reca.config.recipe import LogConfig, Recipe
from reca.data.batch import Batch
from reca.io.folders import ensure_writable
from reca.io.paths import exists
from reca.models.base import Adapter
from reca.models.common.deferred_weights import local_part
from reca.optim import gradient_norm
from reca.runs.folder_lock import is_locked
from reca.trainer import Trainer
from reca.training.skipped_steps import NonFiniteError

TARGET = 0.5  # default target: final loss as a fraction of the initial one
FLAT = 0.01  # relative change of the loss below which it counts as constant
STILL = 1e-3  # total relative change of the weights below which the learning rate counts as too small
MARGIN = 1.3  # factor on the advised number of steps, because a loss falls more and more slowly
LAST = 3  # number of last losses; the smallest is the final loss


class NotLearning(RuntimeError):
    """The dry run did not overfit its batch; the message says why."""

    exit_code = exits.NOT_LEARNING


@dataclass
class DryRun:
    """Result of a dry run.

    target     required final loss, as a fraction of the initial one
    lr         learning rate, constant
    losses     loss of every step, before its update
    tasks      losses by task: one measured before the first step, then one per step
    gradients  gradient norm by role, the larger of before and after training; empty with optim.fused_backward, which
               frees gradients
    size       root mean square of the trained parameters at the start
    non_finite whether the run ended because the loss or gradient was NaN or infinite
    """

    target: float
    lr: float
    losses: list[float]
    tasks: dict[str, list[float]]
    gradients: dict[str, float]
    size: float
    non_finite: bool = False

    @property
    def share(self) -> float:
        """Return the final loss as a fraction of the initial one; NaN if that is not positive."""
        first = self.losses[0] if self.losses else 0.0
        return min(self.losses[-LAST:]) / first if first > 0 else math.nan

    @property
    def reached(self) -> bool:
        return not self.non_finite and self.share <= self.target

    def describe(self) -> list[str]:
        """Return a summary in lines: losses, losses by task, gradient norms, notes."""
        lines, steps = [], len(self.losses) - 1
        if self.losses:
            share = f": {self.share:.1%} of the initial loss (target: at most {self.target:.0%})"
            lines.append(
                f"loss       {self.losses[0]:.4g} initially, {self.losses[-1]:.4g} after {steps} steps on the same "
                f"batch{'' if math.isnan(self.share) else share}"
            )
        if len(self.tasks) > 1 and self.losses:
            parts = (f"{task} {losses[0]:.4g} to {losses[-1]:.4g}" for task, losses in self.tasks.items())
            lines.append(f"tasks      {', '.join(parts)}")
        if self.gradients:
            lines.append(f"gradients  {', '.join(f'{role} {norm:.3g}' for role, norm in self.gradients.items())}")
        lines += [f"note       {text}" for text in self._silent_roles()] if self.reached else []
        return lines

    def fault(self) -> str:
        """Return what is wrong and what to do; empty if the target was reached."""
        if self.reached:
            return ""
        if self.non_finite:
            return self._non_finite()
        if self.lr == 0:
            return "the learning rate is 0: set optim.lr"
        if silent := self._silent_roles():
            return "; ".join(silent)
        if math.isnan(self.share):
            return (
                f"the initial loss is {self.losses[0]:.4g}, and the target is a fraction of it: it must be positive. "
                "Add a constant to the loss"
            )
        steps = len(self.losses) - 1
        moved = self.lr * steps / self.size if self.size else math.inf
        if abs(1 - self.share) < FLAT and moved < STILL:
            return (
                f"the loss is constant because the learning rate is too small: {steps} steps of optim.lr={self.lr:g} "
                f"change weights of RMS {self.size:.2g} by about {moved:.1g} of it. Raise optim.lr"
            )
        if self.share > 1 + FLAT or max(self.losses) > 2 * self.losses[0]:
            return (
                f"the loss rises (up to {max(self.losses):.4g}): optim.lr={self.lr:g} is too large. Lower it, or clip "
                "gradients (optim.max_grad_norm)"
            )
        if abs(1 - self.share) < FLAT:
            return (
                "the loss is constant although weights change: it hardly depends on what is trained (train.roles, "
                "train.frozen), or the inputs are wrong. Train more roles, or look at the data (reca data view)"
            )
        more = math.ceil(MARGIN * steps * math.log(self.target) / math.log(self.share))
        return (
            f"the loss falls, but not far enough: at this rate it needs about {more} steps. Use --overfit {more}, or "
            f"raise optim.lr above {self.lr:g} for the dry run"
        )

    def _non_finite(self) -> str:
        bad = [task for task, losses in self.tasks.items() if not math.isfinite(losses[0])]
        roles = [role for role, norm in self.gradients.items() if not math.isfinite(norm)]
        if bad:
            where = f"the loss of {' and '.join(bad)} is not finite before any update"
        elif roles:
            where = f"the gradient of {' and '.join(roles)} is not finite before any update"
        else:
            where = f"the loss or gradient became non-finite after {len(self.losses)} steps of optim.lr={self.lr:g}"
        return f"{where}: look at the data (reca data check), set train.precision=fp32, or lower optim.lr"

    def _silent_roles(self) -> list[str]:
        zero = [role for role, norm in self.gradients.items() if norm == 0]
        if not zero:
            return []
        return [
            f"the gradient is zero in {' and '.join(zero)}: no loss depends on its trained parameters. Remove it from "
            "train.roles, or set a positive weight for a task that trains it"
        ]


def overfit(recipe: Recipe, steps: int, target: float = TARGET, adapter: Adapter | None = None) -> DryRun:
    """Train `steps` steps on the recipe's first batch. All ranks must call it.

    adapter: a model to train instead of the recipe's.
    Raises ValueError if steps or target is out of range, and the errors of `Trainer`.
    """
    if steps < 2 or not 0 < target < 1:
        raise ValueError(
            f"--overfit must be at least 2 and --overfit-to between 0 and 1 (exclusive), got {steps} and {target:g}"
        )
    distributed.initialize(recipe.parallel.timeout_minutes)
    with _scratch(Path(recipe.run_dir)) as folder:
        trainer = Trainer(_dry(recipe, steps, folder), adapter, progress=lambda _: None)
        with trainer.around():
            found = _learn(trainer, steps, target)
        trainer.folder.close()
        distributed.barrier()  # until no rank uses the folder
    return found


def _learn(trainer: Trainer, steps: int, target: float) -> DryRun:
    batches = trainer.next_batches({task: loader.steps() for task, loader in trainer.loaders.items()})
    for loader in trainer.loaders.values():
        loader.close()
    found = DryRun(target, trainer.recipe.optim.lr, [], {}, {}, _size(trainer.adapter))
    found.gradients, first = _gradients(trainer, batches)
    found.tasks = {task: [loss] for task, loss in first.items()}
    try:
        for _ in range(steps + 1):
            metrics = trainer.train_step(batches)
            found.losses.append(metrics["loss"])
            for task in trainer.tasks:
                found.tasks.setdefault(task, []).append(metrics[f"{task}/loss"])
            if distributed.any_rank(trainer.interruption.requested):
                raise KeyboardInterrupt
    except NonFiniteError:
        found.non_finite = True
        return found
    for role, norm in _gradients(trainer, batches)[0].items():
        found.gradients[role] = max(norm, found.gradients[role])
    return found


def _dry(recipe: Recipe, steps: int, folder: Path) -> Recipe:
    """Return the recipe of a dry run: without warm-up, decay, EMA, evaluations, skipped steps and optional logging."""
    return replace(
        recipe,
        run_dir=str(folder),
        optim=replace(recipe.optim, warmup_steps=0, schedule="constant", decay_steps=None),
        train=replace(recipe.train, steps=steps + 1, max_skips=0, skip_spikes=None),
        eval=replace(recipe.eval, every=0, suite=None, stop_on_alarm=False),
        ema=replace(recipe.ema, half_life=0.0),
        log=replace(LogConfig(), tensorboard=False, reconstructions=0),
        data=replace(recipe.data, prefetch=0),
    )


@contextlib.contextmanager
def _scratch(run_dir: Path) -> Iterator[Path]:
    """Create a temporary sibling of the run folder, visible to all ranks. On exit, remove it and new parent folders."""
    parent, name = run_dir.absolute().parent, f".{run_dir.name}.overfit-"
    folder = parent / f"{name}{distributed.all_gather(os.getpid())[0]}"
    above = [path for path in folder.parents if not exists(path)]
    with distributed.fail_together():
        if distributed.rank() == 0:
            for old in parent.glob(f"{glob.escape(name)}*"):
                if not is_locked(old):  # left by a dry run that was killed
                    shutil.rmtree(old, ignore_errors=True)
            ensure_writable(folder, "run_dir")
    try:
        yield folder
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            for path in above:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _gradients(trainer: Trainer, batches: Mapping[str, list[Batch]]) -> tuple[dict[str, float], dict[str, float]]:
    """Run a forward and backward pass without an update. Return the gradient norm by role and the loss by task.

    Both are empty with optim.fused_backward.
    """
    if trainer.fused_backward:
        return {}, {}
    recipe, adapter = trainer.recipe, trainer.adapter
    adapter.train()
    sums = objective.backward(adapter, dict(batches), recipe.objective, recipe.train.seed, trainer.autocast)
    roles, trained = adapter.roles(), dict[str, list[nn.Parameter]]()
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            trained.setdefault(roles[name], []).append(parameter)
    norms = {role: gradient_norm(nn.ParameterList(parameters), None) for role, parameters in trained.items()}
    trainer.optimizer.zero_grad()
    means = objective.means(sums, trainer.tasks)
    return norms, {task: means[f"{task}/loss"] for task in trainer.tasks}


@torch.no_grad()
def _size(adapter: Adapter) -> float:
    """Compute the root mean square of the trained parameters; of this rank's shard if they are sharded."""
    parts = [local_part(parameter) for parameter in adapter.parameters() if parameter.requires_grad]
    squares = torch.stack([part.double().square().sum() for part in parts]).sum()
    return float((squares / max(1, sum(part.numel() for part in parts))).sqrt())
