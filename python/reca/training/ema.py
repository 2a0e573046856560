"""Exponential moving average (EMA) of the trained parameters, in fp32.

After n steps the average is sum_k 2^(-(n-k)/half_life) p_k / sum_k 2^(-(n-k)/half_life) over the parameters p_1 ... p_n
after each step: the weight of a step halves every half_life steps. The initial weights are not part of the average. In
the release they are: with its decay of 0.9999, they still make up 0.9999^1000 = 90 % of the average after 1000 steps.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reca.models.base import Adapter
from reca.models.common.deferred_weights import local_part


class EMA:
    """The fp32 average of each trained parameter by name, placed and sharded like the parameter.

    Skipped steps do not count. half_life: in steps. updates: number of averaged steps.
    """

    def __init__(self, adapter: Adapter, half_life: float):
        self.half_life, self.updates = half_life, 0
        self.parameters = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters after a step to the average."""
        self.updates += 1
        weight = newest_weight(self.updates, self.half_life)
        for name, average in self.averages.items():
            local_part(average).lerp_(local_part(self.parameters[name]).float(), weight)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores in addition to the averages."""
        return {"half_life": self.half_life, "updates": self.updates}

    def continues(self, state: Mapping[str, Any]) -> bool:
        """Tell whether this average can continue that of a checkpoint. state: of that checkpoint."""
        return (state.get("ema") or {}).get("half_life") == self.half_life


def newest_weight(updates: int, half_life: float) -> float:
    """Return the weight of the newest of `updates` steps: 1 for the first, decreasing towards 1 - 2^(-1/half_life)."""
    rate = math.log(2) / half_life
    return math.expm1(-rate) / math.expm1(-rate * updates)
