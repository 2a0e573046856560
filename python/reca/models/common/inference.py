"""What generate, edit and answer of every UMM share: checks of what they are asked, and the options they take."""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from torch import nn
from transformers import PreTrainedTokenizerBase

from reca.models.common.text import encode

log = logging.getLogger("reca")

SEEDS = 2**56  # above it, the address of a sample's noise would not fit
AT_LEAST_ONE = ("steps", "batch", "height", "width", "diffusion_steps")
TYPES = {int: "a whole number", float: "a number", str: "a word", NoneType: "null"}


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside, whatever mode the model is in, and restore the mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_pairs(**lists: Sequence) -> None:
    """Raise ValueError unless all lists are of one length, or when a seed lies outside [0, 2**56)."""
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"{counts}; there must be as many of each")
    for seed in lists.get("seeds", ()):
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed {seed} lies outside 0 to 2**56 - 1; give another")


def check_multiple(factor: int, height: int, width: int) -> None:
    """Raise ValueError for an image that is not whole tokens, of `factor` pixels on a side."""
    if height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {height} x {width}")


def sampling_options(method: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """`given` as keyword arguments of an adapter's generate or edit: its keyword-only parameters.

    Raises ValueError for a name that is none of them, a value of another type, or a count below 1.
    """
    known = {p.name: p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY}
    checked = {}
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            usual = ", ".join(f"{p.name}={_shown(p.default)}" for p in known.values())
            raise ValueError(f"there is no sampling config_field {name!r}{hint}. Options and their defaults: {usual}")
        wanted = known[name].annotation
        if not _fits(value, wanted):
            usual = _shown(known[name].default)
            raise ValueError(
                f"sampling config_field {name}={_shown(value)}: expected {_words(wanted)}, such as {usual}"
            )
        if name in AT_LEAST_ONE and value is not None and value < 1:
            raise ValueError(f"sampling config_field {name}={value}: expected at least 1")
        checked[name] = tuple(value) if isinstance(value, list) else value
    return checked


def warn_of_cut(prompts: Sequence[Sequence[int]], most: int) -> None:
    """Log that prompts have more tokens than the model reads of one."""
    longest = max(map(len, prompts), default=0)
    if longest > most:
        log.warning("a prompt has %d tokens and this model reads %d of it: its end is cut off", longest, most)


def warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Log the words that a tokenizer has no token for; the model reads <unk> in their place."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    words = dict.fromkeys(word for text in texts for word in text.split() if unknown in encode(tokenizer, word))
    if words:
        log.warning("words that this model does not know are read as %s: %s", tokenizer.unk_token, ", ".join(words))


def warn_of_random_weights(name: str, config: Any) -> None:
    """Log that a model comes from no file and has learned nothing. name: of its recipe, config: its model section."""
    if config.weights is None:
        log.warning(
            "%s names no weights (model.weights=null): this model is random, so its images are noise and its answers "
            "mean nothing; name the folder of a trained run instead, or give model.weights",
            name,
        )


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, UnionType):
        return any(_fits(value, kind) for kind in get_args(wanted))
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is NoneType or not isinstance(value, bool))


def _words(wanted: Any) -> str:
    if isinstance(wanted, UnionType):
        return " or ".join(map(_words, get_args(wanted)))
    if get_origin(wanted) is tuple:
        return f"[{', '.join(map(_words, get_args(wanted)))}]"
    return TYPES[wanted]


def _shown(value: Any) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
