"""Optimizer steps inside the backward pass, so that the gradients never all exist at once.

A parameter is updated as soon as its gradient is complete, and the gradient is freed. This excludes everything that
needs all gradients: accumulation over backward passes, clipping to the global norm, and skipping a step because of it.

If a gradient is not finite, its parameter and all later ones in the same backward pass stay unchanged, with their
moments and step counts. Earlier ones have already been updated.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reca.config.recipe import Recipe
from reca.data.micro_batches import accumulation_steps
from reca.optim.adamw import AdamW
from reca.optim.gradients import HALVES
from reca.options.fields import RecipeError


class FusedBackward:
    """Updates each parameter of an optimizer as soon as its gradient is complete, in backward passes inside `steps`."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        assert isinstance(optimizer, AdamW), "make_optimizer returns it for optim.fused_backward"
        self.optimizer = optimizer
        self.norms: list[Tensor] = []  # norms of this step's gradients, fp32 [] each, on the device
        self.skip: Tensor | None = None  # fp32 []; 1 after the first gradient that is not finite

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Update parameters in the backward pass of this context. Its hooks would outlive the run that made them."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._update, group))
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32 if gradient.dtype in HALVES else None)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # so that all ranks skip the same parameters
        self.norms.append(norm)
        bad = (~norm.isfinite()).float()
        self.skip = bad if self.skip is None else torch.maximum(self.skip, bad)
        self.optimizer.update(parameter, group, self.skip)
        if gradient.is_cuda:  # FSDP2 runs this on another stream than the one that allocated the gradient
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.record_stream(torch.cuda.current_stream())
        parameter.grad = None

    def finish_step(self) -> float:
        """Return the global norm of the gradients since the last call. Synchronises with the device."""
        norms, self.norms, self.skip = self.norms, [], None
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def check_passes(recipe: Recipe, ranks: int) -> None:
    """Raise RecipeError if the recipe has optim.fused_backward and several backward passes per step."""
    passes = {task: accumulation_steps(getattr(recipe.objective, task), ranks) for task in recipe.active_tasks()}
    for task in recipe.active_tasks() if recipe.optim.fused_backward else ():
        config = getattr(recipe.objective, task)
        if config.max_tokens is not None and config.batch_size > ranks:
            raise RecipeError(
                f"optim.fused_backward=true needs one backward pass per step, but with objective.{task}.max_tokens the "
                f"number depends on the samples' lengths: set objective.{task}.max_tokens=null"
            )
    if not recipe.optim.fused_backward or sum(passes.values()) == 1:
        return
    made = ", ".join(f"{number} of {task}" for task, number in passes.items())
    raise RecipeError(
        f"optim.fused_backward=true needs one backward pass per step, but with {ranks} process{'es' * (ranks > 1)} "
        f"this recipe has {sum(passes.values())} ({made}): raise micro_batch to batch_size / processes and train one "
        "task, or set optim.fused_backward=false"
    )
