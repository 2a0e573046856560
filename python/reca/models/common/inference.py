"""Argument checks and warnings of generate, edit and answer, for every model."""

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from reca.io.paths import is_dir
from reca.models.common.text import encode
from reca.precision import attention_without_plans, usual_defaults

log = logging.getLogger("reca")
M = TypeVar("M", bound=Callable)

TEXTS = frozenset({"prompts", "instructions", "questions", "answers"})
SEEDS = 2**56  # seeds are below it, so that the counter of a sample's noise fits
_WARNED: set[int] = set()  # limits that `warn_of_cut` has warned of


def options_of(function: Callable) -> Callable[[M], M]:
    """Decorate a method that forwards its options to `function`, so that it shows that function's signature."""

    def decorate(method: M) -> M:
        return cast(M, functools.wraps(function)(method))

    return decorate


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside this context, without cuDNN attention and the caller's defaults of tensors.

    The training mode is restored afterwards.
    """
    training = model.training
    model.eval()
    try:
        with attention_without_plans(), usual_defaults():
            yield
    finally:
        model.train(training)


def check_pairs(**lists: Sequence) -> None:
    """Raise ValueError if the lists differ in length, or if a seed is outside [0, 2**56).

    Raises TypeError for anything but a list or the like (a string's characters would pass for prompts), for an item
    that is not a string, and for a seed that is not an integer.
    """
    for name, values in lists.items():
        if isinstance(values, str | int):
            raise TypeError(f"{name}={values!r} must be a list; write {name}=[{values!r}]")
        if isinstance(values, Mapping) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
            raise TypeError(f"{name} must be a list, got {type(values).__name__}")
    for name in TEXTS.intersection(lists):
        for value in lists[name]:
            if not isinstance(value, str):
                raise TypeError(f"{name} must be strings, got {value!r}")
    for seed in lists.get("seeds", ()):
        if not _is_index(seed):
            raise TypeError(f"seeds must be integers, got {seed!r}")
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"{counts}; expected the same number of each")
    for seed in lists.get("seeds", ()):
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed {seed} is outside 0 to 2**56 - 1; choose another")


def _is_index(seed: Any) -> bool:
    try:
        operator.index(seed)
    except TypeError:  # of a tensor of floats, too, although it has __index__
        return False
    return not isinstance(seed, bool)


def check_multiple(factor: int, height: int, width: int) -> None:
    """Raise ValueError for an image size that is not a multiple of a token's `factor` x `factor` pixels."""
    if height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {height} x {width}")


def warn_of_cut(lengths: Iterable[int], most: int) -> None:
    """Warn if a prompt has more tokens than the model's limit `most`, once per process: prompts come in batches."""
    longest = max(lengths, default=0)
    if longest > most and most not in _WARNED:
        _WARNED.add(most)
        log.warning(
            "a prompt has %d tokens, but this model reads at most %d: its end is truncated; this is reported once",
            longest,
            most,
        )


def truncated(prompts: Sequence[list[int]], most: int, end: int = 0) -> list[list[int]]:
    """Truncate users' prompts to `most` tokens, of which the last `end` are kept, and warn if one is longer."""
    warn_of_cut(map(len, prompts), most)
    return [ids if len(ids) <= most else [*ids[: most - end], *ids[len(ids) - end :]] for ids in prompts]


def check_template(text: str, tokens: int, most: int) -> None:
    """Raise ValueError if the prompt of a template, of `tokens` tokens besides images, has more than `most`."""
    if tokens > most:
        shown = text if len(text) <= 160 else f"{text[:160]} …"
        raise ValueError(
            f"the prompt of a template has {tokens} tokens, but this model reads at most {most} besides images; "
            f"shorten it in data.templates: {shown!r}"
        )


def warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> None:
    """Warn of words that the tokenizer maps to its unknown token."""
    unknown = tokenizer and tokenizer.unk_token_id
    if tokenizer is None or unknown is None:
        return
    words = dict.fromkeys(word for text in texts for word in text.split() if unknown in encode(tokenizer, word))
    if words:
        log.warning("words outside this model's vocabulary are read as %s: %s", tokenizer.unk_token, ", ".join(words))


def warn_of_untrained(source: str | Path) -> None:
    """Warn if `source` is the recipe file of a run: it names the weights before training, not the trained ones."""
    path = Path(source)
    if path.name == "recipe.yaml" and is_dir(path.parent / "checkpoints"):
        log.warning(
            "%s is the recipe of a run and loads the model before training; for the trained model pass the folder %s",
            path,
            path.parent,
        )


def warn_of_random_weights(name: str, config: Any) -> None:
    """Warn that a model has random weights. name: its recipe's name; config: the recipe's model section."""
    if config.weights is None:
        log.warning(
            "%s names no weights (model.weights=null): this model is random, so its images are noise and its answers "
            "are meaningless; pass the folder of a trained run instead, or set model.weights",
            name,
        )
