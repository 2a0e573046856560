"""Batches of one task: what loaders yield and losses read."""

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
    """Return the random number generator of one task. Sample ids are counted per task, so each task has its own key.

    path: sub-stream, as in CounterRNG.
    """
    return CounterRNG(seed, TASKS.index(task), *path)


@dataclass
class Batch:
    """Samples of one task.

    gen, und    uint8 [3, H, W] per sample; None if the task does not need the view
    text        reca: the template sentence; t2i: the caption; i2t: a list of Turn; srum: Scored
    features    result of `encode` for these samples, if read from a cache
    on_encoded  called with the result of `encode`, to cache it
    neighbour   one more sample, whose h_v the last sample of this batch gets under condition "other"
    counted     False for a copy of another rank's micro-batch, which contributes nothing to loss or gradient
    target      srum: generation view of the image that each sample stays close to; None: the sample itself
    sources     index of each sample's source in a mixture; None: a single source
    prepared    result of `Adapter.prepare`, if the loader has called it; not copied by `replace`
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
        """Return a copy on `device`, without host synchronisation (`on_device`)."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                if value.is_cuda:  # from the decoder's stream, which must not reuse the memory while it is read
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
        """Return a batch of the samples at `places`, with their ids, texts and pixels only."""

        def take(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[place] for place in places]

        ids = self.sample_ids[torch.as_tensor(places, device=self.sample_ids.device)]
        return Batch(self.task, ids, take(self.text) or [], take(self.gen), take(self.und))

    def uncounted(self) -> "Batch":
        """Return a copy that contributes nothing to loss or gradient."""
        copied = copy.copy(self)
        copied.counted, copied.on_encoded = False, None
        return copied

    @property
    def host_ids(self) -> Tensor:
        """Return sample_ids on the host, whatever the device of the batch: int64 [B].

        Draws that determine shapes use these ids, since reading ids from a GPU would synchronise. Both hold the same
        values, so the draws are the same.
        """
        return self.sample_ids.cpu() if self._host_ids is None else self._host_ids
