"""The structure of results.json and generation.json, which damaged files do not have."""

from reca.io.shape import OrNull

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
GENERATION = {"model": MODEL.shape, "sampling?": {str: object}, "items?": {str: str | None}}
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
