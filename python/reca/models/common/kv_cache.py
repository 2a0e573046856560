"""The KV cache of a transformers model."""

import inspect
from typing import Any

from transformers import Cache, PreTrainedModel


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Return the arguments by which a model's forward reads keys and values from a cache, and appends its own."""
    renamed = "cache" in inspect.signature(type(model).forward).parameters  # past_key_values before transformers 5.2x
    return {"cache" if renamed else "past_key_values": cache, "use_cache": True}
