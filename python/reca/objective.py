"""L_total = sum over tasks of lambda_k * L_k, each L_k a mean over the whole step.

A task's loss is (sum over ranks and micro-batches of its sums) / (the same of its weights). So one GPU that
accumulates eight micro-batches makes the step that eight GPUs make at once, and lambda keeps its meaning when
micro-batches carry different numbers of tokens.

With objective.mean=micro_batch it is a mean of the micro-batches' own means, each with its share of the step's
samples. That is the release's mean where all have the same size. It depends on which samples share a micro-batch.
"""

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from reca import distributed, inference
from reca.config import ObjectiveConfig
from reca.data.batch import Batch, task_rng
from reca.models.base import Adapter, LossTerm
from reca.options import RecipeError
from reca.parallelize import set_gradient_sync
from reca.rng import CounterRNG
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
    """Add the gradient of L_total over `batches` to the parameters.

    batches: the micro-batches of one step on this rank, by task. Every rank has as many.
    labels: of the sources of tasks whose loss is wanted by source, too: as TASK/loss@LABEL, where the model tells it.
    Returns fp32 [2] tensors (sum, weight) by task, over the samples that this rank counts; fp64 where the weights are.
    Over all ranks, sum / weight of a task is its L_k; of a source the mean over its labels, whatever objective.mean.
    A task without any label in the whole step adds nothing.
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
    by_source = {
        task: totals[task].new_zeros(len(names), 2) for task, names in labels.items() if names and task in totals
    }
    for position, (task, batch) in enumerate(work):
        set_gradient_sync(adapter, position == len(work) - 1)
        condition = objective.condition if task == "reca" else "own"
        with autocast:
            term = adapter(batch, rng[task], condition)
        _check_reach(adapter, task, term)
        weight, samples = totals[task]
        share: float | Tensor = 1.0  # of the sum in what is logged: the task's loss is what is optimised
        if not batch.counted:
            # Its rank, too, sends a gradient of zero back through the whole model, since FSDP2 communicates there. A
            # NaN on the way cannot come from here alone: the rank that counts these very samples has the same one.
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


def _ready(adapter: Adapter, batch: Batch, rng: CounterRNG, by_sample: bool = False) -> Batch:
    """Return the batch with what its loss needs, which the loader has made unless the batch came another way."""
    ready = copy.copy(batch)
    ready.prepared = adapter.ensure_prepared(batch, rng)
    if by_sample:
        ready.prepared = ready.prepared.asked_by_sample()
    return ready


def _total_dtype(adapter: Adapter) -> torch.dtype:
    """Return the type of sums over samples: fp32, or fp64 in a run of fp64."""
    return torch.float64 if next(adapter.parameters()).dtype == torch.float64 else torch.float32


def _totals(batches: dict[str, list[Batch]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Add up weight and samples of each task in the whole step, [2] each, on the device.

    They are known on the host, so no rank runs the model for them, and one call adds up those of all ranks.
    """
    own = []
    for micro_batches in batches.values():
        counted = [batch for batch in micro_batches if batch.counted]
        own.append([sum(batch.prepared.weight for batch in counted), float(sum(map(len, counted)))])
    device = next(iter(batches.values()))[0].sample_ids.device
    total = distributed.sum_over_ranks(on_device(torch.tensor(own, dtype=dtype), device))
    return dict(zip(batches, total, strict=True))


def means(sums: dict[str, Tensor], tasks: Iterable[str]) -> dict[str, float]:
    """Add up this rank's (sum, weight) pairs with those of others, and divide: a task's loss and weight, or a mean.

    sums: fp32 [2] by name, the same names on every rank. They take one exchange and one transfer.
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
    """Refuse a loss that no trained parameter has a part in, which backward would only find without saying which.

    Raises RecipeError.
    """
    if term.sum.requires_grad:
        return
    roles, trained = adapter.roles(), set()
    for name, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            trained.add(roles[name])
    raise RecipeError(
        f"the {task} loss of {adapter.name} depends on no parameter that is trained (of roles "
        f"{', '.join(sorted(trained))}), so it cannot train: set objective.{task}.weight=0, or name another role in "
        f"train.train (there are {', '.join(sorted(set(roles.values())))})"
    )


@torch.no_grad()
def evaluate(
    adapter: Adapter,
    batches: Iterable[Batch],
    seed: int,
    autocast: contextlib.AbstractContextManager,
    condition: str = "own",
) -> float:
    """Compute the mean loss over fixed batches, with the random numbers of their sample ids and without dropout."""
    adapter.eval()
    sums = torch.zeros(2, device=next(adapter.parameters()).device, dtype=_total_dtype(adapter))
    with inference.together(adapter):
        for batch in batches:
            with autocast:
                term = adapter(batch, task_rng(seed, batch.task), condition)
            if batch.counted:
                sums += torch.stack((term.sum, term.weight))
    total, weight = distributed.sum_over_ranks(sums).tolist()
    return total / weight if weight else 0.0
