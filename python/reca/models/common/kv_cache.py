"""KV caches of transformers models."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

ROOM = 64  # rows that memory is enlarged by


class GrowingLayer(DynamicLayer):
    """Write new rows into memory that has room for more. Transformers' layer copies all rows for every new one."""

    memory: tuple[Tensor, Tensor] | None = None  # keys and values [B, H, rows and room, d]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), (key_states, value_states)
        stop = start + key_states.shape[2]
        if self.memory is None or self.memory[0].shape[2] < stop:
            larger = [x.new_empty(*x.shape[:2], stop + ROOM, x.shape[3]) for x in new]
            for to, rows in zip(larger, self.memory or (), strict=False):
                to[:, :, :start] = rows[:, :, :start]
            self.memory = (larger[0], larger[1])
        for to, rows in zip(self.memory, new, strict=True):
            to[:, :, start:stop] = rows
        self.keys, self.values = (x[:, :, :stop] for x in self.memory)
        return self.keys, self.values


class PromptLayer(DynamicLayer):
    """Keep the rows of the first pass only. Those of a later pass are appended for that pass and then freed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        return torch.cat((self.keys, key_states), dim=2), torch.cat((self.values, value_states), dim=2)


def prompt_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache that keeps the rows of the first pass, the prompts."""
    return Cache(layers=[PromptLayer() for _ in range(model.config.num_hidden_layers)])


def decoding_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache to which rows are appended without copying the earlier ones, for passes without gradients.

    Up to ROOM rows of it are unused.
    """
    return Cache(layers=[GrowingLayer() for _ in range(model.config.num_hidden_layers)])


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Return the keyword arguments with which a model's forward pass uses and extends a KV cache."""
    renamed = "cache" in inspect.signature(type(model).forward).parameters  # past_key_values before transformers 5.2x
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}
