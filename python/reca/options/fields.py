"""Declaration of recipe keys: dataclass fields with documentation and bounds."""

import math
from dataclasses import field, fields
from typing import Any

from reca.options.names import hint

LARGEST = 2**63 - 1  # upper bound of integer keys without a bound of their own

# Kinds of path keys, which decide how a value is made absolute (recipe_files.absolute_paths).
LOCAL = "local"  # a file or folder
GLOB = "glob"  # a file, a folder, a pattern of tar files, or an importable spec (reca/data/spec.py)
SPEC = "spec"  # a file, or an importable spec
HUB = "hub"  # an existing file or folder, otherwise a name on the Hugging Face hub
JUDGE = "judge"  # NAME, or NAME:ARGUMENT with an argument of kind HUB


class RecipeError(ValueError):
    """A recipe cannot be run as written; the message names the key, the reason and a valid value."""


def config_field(
    default: Any,
    doc: str = "",
    choices: tuple | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    fewest: int = 0,
    path: str | None = None,
) -> Any:
    """Declare a recipe key. Pass mutable defaults (lists, nested configs) as a callable.

    choices: the allowed values of the key, or of each item of a list. least, most: inclusive bounds of a number, or of
    each number of a list. above, below: exclusive bounds. fewest: minimum length of a list. path: LOCAL, GLOB, SPEC,
    HUB or JUDGE for a string that names files.
    """
    metadata: dict[str, Any] = {"doc": doc, "choices": choices, "fewest": fewest, "path": path}
    metadata |= {"least": least, "above": above, "most": most, "below": below}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def count(default: Any, doc: str = "") -> Any:
    """Declare a recipe key that is a count, or a list of counts: at least 1."""
    return config_field(default, doc, least=1, most=2**24, fewest=1)


def pixels(default: int | None, doc: str = "") -> Any:
    """Declare a recipe key that is an image size in pixels: at least 1."""
    return config_field(default, doc, least=1, most=2**14)


def share(default: float, doc: str = "") -> Any:
    """Declare a recipe key that is a fraction, from 0 to 1."""
    return config_field(default, doc, least=0, most=1)


def check_values(config: Any, prefix: str = "") -> None:
    """Raise RecipeError if a field of `config` violates its declaration. prefix: of the keys, for the message."""
    for f in fields(config):
        choices, value, key = f.metadata.get("choices"), getattr(config, f.name), f"{prefix}{f.name}"
        for item in value if isinstance(value, list) else [value]:
            if choices and item not in choices:
                among = ", ".join(map(format_value, choices))
                raise RecipeError(f"{key}={format_value(item)} is not one of {among}{hint(item, choices)}")
        if isinstance(value, list):
            if len(value) < f.metadata.get("fewest", 0):
                raise RecipeError(f"{key}={format_value(value)} must have at least {f.metadata['fewest']} item")
            for i, item in enumerate(value):
                _check_number(f"{key}[{i}]", item, f.metadata)
        _check_number(key, value, f.metadata)


def check_heads(config: Any, prefix: str) -> None:
    """Raise RecipeError if the sizes of a transformer are inconsistent. Groups of other keys are ignored.

    hidden_size must be a multiple of the number of heads, the number of query heads a multiple of the number of
    key-value heads, and the number of rotary channels per head even.
    """
    width, heads, groups, theta, rotary = (
        getattr(config, name, None)
        for name in (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "rope_theta",
            "partial_rotary_factor",
        )
    )
    if width is None or heads is None:
        return
    if width % heads:
        raise RecipeError(f"{prefix}hidden_size={width} must be a multiple of {prefix}num_attention_heads={heads}")
    if groups and heads % groups:
        raise RecipeError(
            f"{prefix}num_attention_heads={heads} must be a multiple of {prefix}num_key_value_heads={groups}"
        )
    turned = int(width // heads * (rotary or 1))
    if theta and (turned % 2 or not turned):
        raise RecipeError(
            f"{prefix}hidden_size={width} with {prefix}num_attention_heads={heads} gives {turned} rotary channels per "
            "head, which must be a positive even number"
        )


def format_value(value: Any) -> str:
    """Format a value for a message, on one line and shortened to about 90 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 90 else f"{text[:60]}...{text[-20:]}"


def _check_number(key: str, value: Any, metadata: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key}={value} must be a finite number")
    least, above, most, below = (metadata.get(name) for name in ("least", "above", "most", "below"))
    if least is not None and value < least:
        raise RecipeError(f"{key}={_number(value)} must be at least {_number(least)}")
    if above is not None and value <= above:
        raise RecipeError(f"{key}={_number(value)} must be above {_number(above)}")
    if below is not None and value >= below:
        raise RecipeError(f"{key}={_number(value)} must be below {_number(below)}")
    if most is None and isinstance(value, int):
        most = LARGEST
    if most is not None and value > most:
        raise RecipeError(f"{key}={_number(value)} must be at most {_number(most)}")


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
