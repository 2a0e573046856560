"""The structure of JSON files, which damaged ones do not have."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, NamedTuple


class OrNull(NamedTuple):
    shape: Any


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Return the place, such as items[3].value, where a value of a JSON file has another shape; None if it has none.

    shape: a type; a list of one shape, of all items; a tuple of the shapes of two or more items; a dict of the shapes
    of keys, or of the values of all keys; OrNull.
    """
    if isinstance(shape, OrNull):
        return None if value is None else misfit(value, shape.shape, place)
    if isinstance(shape, type | UnionType):
        return None if isinstance(value, shape) else place
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return place
        if str in shape:
            parts = [(one, shape[str], f"{place}.{key}") for key, one in value.items()]
        else:
            parts = [(value.get(key, ...), one, f"{place}.{key}") for key, one in shape.items() if key[-1] != "?"]
            beside = {key[:-1]: one for key, one in shape.items() if key[-1] == "?"}
            parts += [(value[key], one, f"{place}.{key}") for key, one in beside.items() if key in value]
    else:
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            return place
        shapes = shape if isinstance(shape, tuple) else shape * len(value)
        parts = [(one, part, f"{place}[{i}]") for i, (one, part) in enumerate(zip(value, shapes, strict=True))]
    return next((found for part in parts if (found := misfit(*part)) is not None), None)
