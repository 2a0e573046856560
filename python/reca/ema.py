"""Exponential moving average (EMA) of the trained parameters, in fp32.

After n steps the average is sum_k 2^(-(n-k)/half_life) p_k / sum_k 2^(-(n-k)/half_life) over the parameters p_1 ... p_n
after each step: what a step left counts half as much half_life steps later. The weights that the run starts from have
no part in it, so it is no average of the start in a short run, as that of the release is: with its decay of 0.9999,
1000 steps leave 0.9999^1000 = 90 % of the starting weights.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reca.models.base import Adapter
from reca.models.common.deferred_weights import local_part


class EMA:
    """The average of each trained parameter by name, placed and sharded like it. fp32 whatever the parameters are.

    A step that is skipped changes no parameter, and does not count. updates: steps that have been averaged.
    """

    def __init__(self, adapter: Adapter, half_life: float):
        """half_life: in steps."""
        self.half_life, self.updates = half_life, 0
        self.parameters = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of a step that was made into the average."""
        self.updates += 1
        weight = newest_weight(self.updates, self.half_life)
        for name, average in self.averages.items():
            local_part(average).lerp_(local_part(self.parameters[name]).float(), weight)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the averages."""
        return {"half_life": self.half_life, "updates": self.updates}

    def continues(self, state: Mapping[str, Any]) -> bool:
        """Tell whether the average of a checkpoint is this one's beginning. state: of that checkpoint."""
        return (state.get("ema") or {}).get("half_life") == self.half_life


def newest_weight(updates: int, half_life: float) -> float:
    """Return the weight of the newest step in the average of `updates`: 1, falling towards 1 - 2^(-1/half_life)."""
    rate = math.log(2) / half_life
    return math.expm1(-rate) / math.expm1(-rate * updates)
