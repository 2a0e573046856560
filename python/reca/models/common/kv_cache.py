"""The KV cache of a transformers model."""

import functools
import inspect
from typing import Any

from transformers import Cache, PreTrainedModel


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Return the arguments by which a model's forward reads keys and values from a cache, and appends its own."""
    return {_keyword(type(model)): cache, "use_cache": True}


@functools.cache
def _keyword(model: type[PreTrainedModel]) -> str:
    """Name the argument that takes the cache: transformers 5.2x renames past_key_values."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
