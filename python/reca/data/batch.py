"""Batches of one task, which the data makes and the losses read."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reca.data.tasks import TASKS
from reca.rng import CounterRNG
from reca_kernels.host import on_device


def task_rng(seed: int, task: str, *path: int) -> CounterRNG:
    """Return the random numbers of one task. Tasks number their samples separately, so each has a key of its own.

    path: of a sub-stream, as in CounterRNG.
    """
    return CounterRNG(seed, TASKS.index(task), *path)


@dataclass
class Batch:
    """Samples of one task on their way to the loss.

    gen, und    uint8 [3, H, W] per sample, or None where the task's views have none
    text        reca: the template sentence; t2i: the caption; i2t: a list of Turn; srum: Scored
    features    what `encode` returned for these samples, when it comes from a cache
    on_encoded  takes what `encode` returns, to put it into a cache
    neighbour   one more sample, whose h_v the last of these gets under condition "other"
    counted     False for a copy of another rank's micro-batch, which adds nothing to loss or gradient
    target      srum: the generation view of the other image that each stays near; None: all stay near themselves
    sources     of a mixture: the number of the source of each sample; None: there is one source
    prepared    what `Adapter.prepare` returned, when the loader has called it; `replace` leaves it out
    """

    task: str
    sample_ids: Tensor  # int64 [B]
    text: list[Any]
    gen: list[Tensor] | None = None
    und: list[Tensor] | None = None
    features: dict[str, Any] | None = None
    on_encoded: Callable[[dict[str, Any]], None] | None = None
    neighbour: "Batch | None" = None
    counted: bool = True
    target: list[Tensor] | None = None
    sources: list[int] | None = None
    prepared: Any = field(default=None, init=False, repr=False)
    _host_ids: Tensor | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.text)

    def to(self, device: torch.device) -> "Batch":
        """Return the same samples on `device`. No copy waits for what a GPU was given before (`on_device`)."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.is_cuda:  # made on the decoder's stream, whose next batch must not get memory still in use
                    value.record_stream(torch.cuda.current_stream(value.device))
                return on_device(value, device)
            return [move(item) for item in value] if isinstance(value, list) else value

        features = None if self.features is None else {key: move(value) for key, value in self.features.items()}
        moved = replace(
            self,
            sample_ids=move(self.sample_ids),
            gen=move(self.gen),
            und=move(self.und),
            target=move(self.target),
            features=features,
            neighbour=self.neighbour and self.neighbour.to(device),
        )
        moved.prepared = self.prepared and self.prepared.to(device)
        moved._host_ids = self.host_ids
        return moved

    def part(self, places: Sequence[int]) -> "Batch":
        """Return a batch of these samples, with their pixels and texts alone."""

        def take(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[place] for place in places]

        ids = self.sample_ids[torch.as_tensor(places, device=self.sample_ids.device)]
        return Batch(self.task, ids, take(self.text) or [], take(self.gen), take(self.und))

    def uncounted(self) -> "Batch":
        """Return a copy that adds nothing to loss or gradient."""
        copied = copy.copy(self)
        copied.counted, copied.on_encoded = False, None
        return copied

    @property
    def host_ids(self) -> Tensor:
        """sample_ids on the host, wherever the rest is: int64 [B].

        What decides shapes is drawn from them, since reading them from a GPU would synchronise. The bits are the same.
        """
        return self.sample_ids.cpu() if self._host_ids is None else self._host_ids
