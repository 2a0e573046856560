"""KV caches of transformers models."""

import inspect
from typing import Any

from transformers import Cache, PreTrainedModel


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Return the keyword arguments with which a model's forward pass uses and extends a KV cache."""
    renamed = "cache" in inspect.signature(type(model).forward).parameters  # past_key_values before transformers 5.2x
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}
