"""The structure of results.json, which damaged files do not have."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, NamedTuple


class OrNull(NamedTuple):
    shape: Any


NUMBER = int | float
INTERVAL = (NUMBER | None, NUMBER | None)
VALUE = {"value": NUMBER, "interval": INTERVAL}
MODEL = OrNull({"source": str, "umm?": str, "step?": int | None, "weights_sha256?": str | None})
CHANGE = {**VALUE, "difference": NUMBER, "difference_interval": INTERVAL}
FLIP = {"item": str, "tag": str, "prompt": str, "before": NUMBER, "after": NUMBER}
AGAINST = {
    "folder": str,
    "model": MODEL,
    "items": int,
    "overall": CHANGE,
    "tags": {str: CHANGE},
    "differs": {str: (object, object)},
    "flips": [FLIP],
}
IMAGE = {"k": int, "path": str | None, "value": NUMBER, "reason": str | None}
GENERATION = {"model": {"weights_sha256?": str | None}, "sampling?": {str: object}, "items?": {str: str | None}}
# Needed keys and the shapes of their values; ? marks keys that may be missing. `reca.eval` documents all keys.
RESULTS = {
    "suite": str,
    "protocol": str,
    "model": MODEL,
    "sampling": OrNull({str: object}),
    "images?": str | None,
    "images_per_item": int,
    "counts": {"items": int, "images": int, "failed": int, "missing": int},
    "judge": {"name?": str, "version?": object, "dtype?": str | None},
    "overall": {**VALUE, "unit": str},
    "weights": OrNull({str: NUMBER}),
    "tags": {str: VALUE},
    "items": [{"item": str, "tag": str, "prompt": str, "digest?": str | None, "value": NUMBER, "images": [IMAGE]}],
    "power": OrNull([{"images_per_item": int, "difference": NUMBER, "power": NUMBER}]),
    "against": OrNull(AGAINST),
}


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
