"""The training objective: L_total = sum over tasks of lambda_k * L_k, each L_k a mean over the whole step.

L_k is the sum of loss sums over ranks and micro-batches, divided by the sum of weights. So one GPU that accumulates
eight micro-batches computes the same step as eight GPUs, and lambda_k keeps its meaning if micro-batches have different
numbers of tokens.

With objective.mean=micro_batch, L_k is the mean of the micro-batch means, weighted by their share of the step's
samples. It equals the release's mean if all micro-batches have the same size, and depends on which samples share a
micro-batch.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from reca import distributed, inference
from reca.config.recipe import ObjectiveConfig
from reca.data.batch import Batch, task_rng
from reca.models.base import Adapter, LossTerm
from reca.options.fields import RecipeError
from reca.rng import CounterRNG
from reca.training.parallelize import set_gradient_sync
from reca_kernels.host import on_device

TINY = torch.finfo(torch.float32).tiny


def backward(
    adapter: Adapter,
    batches: dict[str, list[Batch]],
    objective: ObjectiveConfig,
    seed: int,
    autocast: contextlib.AbstractContextManager,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Tensor]:
    """Accumulate the gradient of L_total over `batches` into the parameters' .grad.

    batches: this rank's micro-batches of one step, by task. Every rank must pass the same number.
    labels: names of the data sources of tasks in `batches`. For these tasks the loss is also returned per source, as
    TASK/loss@LABEL, if the model computes per-sample losses.
    Returns tensors [2] of (sum, weight) by name, over the samples counted on this rank: fp32, or fp64 if the model is.
    Summed over all ranks, sum / weight is L_k for a task. For a source it is the mean over its predicted tokens,
    whatever objective.mean is. A task without a label in the whole step contributes no gradient.
    """
    rng = {task: task_rng(seed, task) for task in batches}
    labels = labels or {}
    ready = {
        task: [_ready(adapter, batch, rng[task], bool(labels.get(task))) for batch in micro_batches]
        for task, micro_batches in batches.items()
    }
    totals = _totals(ready, _total_dtype(adapter))

    work = [(task, batch) for task, micro_batches in ready.items() for batch in micro_batches]
    sums = {task: torch.zeros_like(total) for task, total in totals.items()}
    by_source = {task: totals[task].new_zeros(len(names), 2) for task, names in labels.items()}
    for position, (task, batch) in enumerate(work):
        set_gradient_sync(adapter, position == len(work) - 1)
        condition = objective.condition if task == "reca" else "own"
        with autocast:
            term = adapter(batch, rng[task], condition)
        _check_reach(adapter, task, term)
        weight, samples = totals[task]
        share: float | Tensor = 1.0  # factor of the sum in the logged loss, so that it equals the optimised one
        if not batch.counted:
            # The backward pass still runs, with a zero gradient, because FSDP2 communicates in it. A NaN here cannot be
            # spurious: the rank that counts these samples has the same one.
            scale: float | Tensor = 0.0
        elif objective.mean == "batch":
            scale = torch.where(weight > 0, distributed.world_size() / weight.clamp(min=TINY), 0.0)
        elif batch.prepared.weight == 0:
            scale = 0.0
        else:
            scale = distributed.world_size() * len(batch) / (samples * batch.prepared.weight)
            share = scale * weight / distributed.world_size()
        (getattr(objective, task).weight * scale * term.sum).backward()
        if batch.counted:
            sums[task] += torch.stack((share * term.sum.detach(), term.weight))
            if task in by_source and batch.sources is not None and term.samples is not None:
                sources = on_device(torch.tensor(batch.sources), term.samples.device)
                by_source[task].index_add_(0, sources, term.samples.to(by_source[task].dtype))
    for task, table in by_source.items():
        sums |= {f"{task}/loss@{label}": row for label, row in zip(labels[task], table, strict=True)}
    return sums


def _ready(adapter: Adapter, batch: Batch, rng: CounterRNG, by_sample: bool) -> Batch:
    """Return a copy of the batch with its `prepared` set, computing it if the loader has not.

    Raises ValueError for a weight that is negative or not finite, with which nothing would be trained.
    """
    ready = copy.copy(batch)
    ready.prepared = adapter.ensure_prepared(batch, rng)
    if not 0 <= ready.prepared.weight < math.inf:
        raise ValueError(
            f"{type(adapter).__module__}.{type(adapter).__name__}.prepare gave a {batch.task} batch the weight "
            f"{ready.prepared.weight}: expected the divisor of its loss, 0 if there is nothing to predict"
        )
    if by_sample:
        ready.prepared = ready.prepared.asked_by_sample()
    return ready


def _total_dtype(adapter: Adapter) -> torch.dtype:
    """Return the dtype of sums over samples: fp32, or fp64 for an fp64 model."""
    return torch.float64 if next(adapter.parameters()).dtype == torch.float64 else torch.float32


def _totals(batches: dict[str, list[Batch]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Sum weight and number of samples of each task over the whole step, [2] each, on the device.

    Both are known on the host before the forward pass, so a single all-reduce suffices.
    """
    own = []
    for micro_batches in batches.values():
        counted = [batch for batch in micro_batches if batch.counted]
        own.append([sum(batch.prepared.weight for batch in counted), float(sum(map(len, counted)))])
    device = next(iter(batches.values()))[0].sample_ids.device
    total = distributed.sum_over_ranks(on_device(torch.tensor(own, dtype=dtype), device))
    return dict(zip(batches, total, strict=True))


def means(sums: dict[str, Tensor], tasks: Iterable[str]) -> dict[str, float]:
    """Sum (sum, weight) pairs over ranks and divide. Return loss and weight of each task, and the mean of other names.

    sums: [2] by name, with the same names on every rank. Costs one all-reduce and one device-to-host copy.
    """
    names = list(sums)
    table = distributed.sum_over_ranks(torch.stack([sums[name].double() for name in names])).tolist()
    metrics: dict[str, float] = {}
    for name, (total, weight) in zip(names, table, strict=True):
        mean = total / weight if weight else 0.0
        if name in tasks:
            metrics |= {f"{name}/loss": mean, f"{name}/weight": weight}
        elif weight or "@" not in name:  # a source may have no sample in a step
            metrics[name] = mean
    return metrics


def _check_reach(adapter: Adapter, task: str, term: LossTerm) -> None:
    """Raise RecipeError if a loss depends on no trained parameter; autograd's own error would not name the task."""
    if term.sum.requires_grad:
        return
    roles, trained = adapter.roles(), set()
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            trained.add(roles[name])
    raise RecipeError(
        f"the {task} loss of {adapter.name} depends on no trained parameter (trained roles: "
        f"{', '.join(sorted(trained))}): set objective.{task}.weight=0, or add another role to train.roles (roles of "
        f"this model: {', '.join(sorted(set(roles.values())))})"
    )


@torch.no_grad()
def evaluate(
    adapter: Adapter,
    batches: Iterable[Batch],
    seed: int,
    autocast: contextlib.AbstractContextManager,
    condition: str = "own",
) -> float:
    """Compute the mean loss over fixed batches in eval mode, with random numbers derived from the sample ids."""
    adapter.eval()
    sums = torch.zeros(2, device=next(adapter.parameters()).device, dtype=_total_dtype(adapter))
    with inference.fail_together(adapter):
        for batch in batches:
            with autocast:
                term = adapter(batch, task_rng(seed, batch.task), condition)
            if batch.counted:
                sums += torch.stack((term.sum, term.weight))
    total, weight = distributed.sum_over_ranks(sums).tolist()
    return total / weight if weight else 0.0
