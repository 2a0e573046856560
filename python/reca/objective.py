"""L_total = sum over kinds of lambda_k * L_k, each L_k a mean over the whole update.

A kind's loss is (sum over ranks and micro-batches of its sums) / (the same of its weights). So one GPU that
accumulates eight micro-batches makes the update that eight GPUs make at once, and lambda keeps its meaning when
micro-batches carry different numbers of tokens.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from reca import distributed
from reca.config import ObjectiveConfig
from reca.draws import Draws
from reca.models.base import KINDS, Adapter, Batch


def kind_draws(seed: int, kind: str) -> Draws:
    """Kinds number their samples separately, so each has a key of its own."""
    return Draws(seed, KINDS.index(kind))


def backward(
    adapter: Adapter,
    batches: dict[str, list[Batch]],
    objective: ObjectiveConfig,
    seed: int,
    autocast: torch.autocast,
) -> dict[str, Tensor]:
    """Add the gradient of L_total over `batches` to the parameters.

    batches: the micro-batches of one update on this rank, by kind. Every rank has as many.
    Returns fp32 [2] tensors (sum, weight) by name, over this rank only: every kind's loss, and the adapter's stats.
    A kind without any label in the whole update adds nothing.
    """
    draws = {kind: kind_draws(seed, kind) for kind in batches}
    own = {k: [adapter.weight(b, draws[k]) for b in bs] for k, bs in batches.items()}
    total = {k: distributed.sum_over_ranks(torch.stack(ws).sum()) for k, ws in own.items()}

    work = [(kind, i) for kind, list_ in batches.items() for i in range(len(list_))]
    sums: dict[str, Tensor] = {}
    for position, (kind, i) in enumerate(work):
        distributed.sync_gradients(adapter, position == len(work) - 1)
        condition = objective.condition if kind == "reca" else "own"
        with autocast:
            term = adapter(batches[kind][i], draws[kind], condition)
        if objective.mean == "update":
            scale = distributed.world() / total[kind].clamp(min=torch.finfo(torch.float32).tiny)
        else:
            scale = 1 / (term.weight.clamp(min=torch.finfo(torch.float32).tiny) * len(batches[kind]))
        (getattr(objective, kind).weight * scale * term.sum).backward()
        _add(sums, {kind: torch.stack((term.sum.detach(), term.weight))})
    return sums


@torch.no_grad()
def evaluate(
    adapter: Adapter, batches: Iterable[Batch], seed: int, autocast: torch.autocast, condition: str = "own"
) -> float:
    """Mean loss over fixed batches, with the draws their sample ids give."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with autocast:
            term = adapter(batch, kind_draws(seed, batch.kind), condition)
        _add(sums, {"loss": torch.stack((term.sum, term.weight))})
    total, weight = distributed.sum_over_ranks(sums["loss"]).tolist()
    return total / weight if weight else 0.0


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
