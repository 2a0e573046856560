"""Checks of what generate, edit and answer are asked, for every model."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from reca.models.common.text import encode
from reca.precision import attention_without_plans

log = logging.getLogger("reca")
M = TypeVar("M", bound=Callable)

TEXTS = frozenset({"prompts", "instructions", "questions", "answers"})
SEEDS = 2**56  # above it, the address of a sample's noise would not fit


def options_of(function: Callable) -> Callable[[M], M]:
    """Decorate a method that passes its options on to `function`: it shows the signature of that one."""

    def decorate(method: M) -> M:
        return cast(M, functools.wraps(function)(method))

    return decorate


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside, and cuDNN's attention, whatever mode the model is in, and restore the mode."""
    training = model.training
    model.eval()
    try:
        with attention_without_plans():
            yield
    finally:
        model.train(training)


def check_pairs(**lists: Sequence) -> None:
    """Raise ValueError unless all lists are of one length, or when a seed lies outside [0, 2**56).

    Raises TypeError for a single text or number, whose characters would else pass for prompts, for an item that is no
    text, which would be drawn as its repr, and for a seed that is no whole number, which would be cut to one.
    """
    for name, values in lists.items():
        if isinstance(values, str | int):
            raise TypeError(f"{name}={values!r} must be a list; write {name}=[{values!r}]")
    for name in TEXTS.intersection(lists):
        for value in lists[name]:
            if not isinstance(value, str):
                raise TypeError(f"{name} must be texts, and one is {value!r}")
    for seed in lists.get("seeds", ()):
        if not hasattr(seed, "__index__"):
            raise TypeError(f"seeds must be whole numbers, and one is {seed!r}")
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"{counts}; there must be as many of each")
    for seed in lists.get("seeds", ()):
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed {seed} lies outside 0 to 2**56 - 1; give another")


def check_multiple(factor: int, height: int, width: int) -> None:
    """Raise ValueError for an image that is not whole tokens, of `factor` x `factor` pixels."""
    if height % factor or width % factor:
        raise ValueError(f"height and width must be multiples of {factor}, got {height} x {width}")


def warn_of_cut(prompts: Sequence[Sequence[int]], most: int) -> None:
    """Log that prompts have more tokens than the model reads of one."""
    longest = max(map(len, prompts), default=0)
    if longest > most:
        log.warning("a prompt has %d tokens and this model reads %d of it: its end is cut off", longest, most)


def warn_of_unknown_words(tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> None:
    """Log the words that a tokenizer has no token for; the model reads <unk> in their place."""
    unknown = tokenizer and tokenizer.unk_token_id
    if tokenizer is None or unknown is None:
        return
    words = dict.fromkeys(word for text in texts for word in text.split() if unknown in encode(tokenizer, word))
    if words:
        log.warning("words that this model does not know are read as %s: %s", tokenizer.unk_token, ", ".join(words))


def warn_of_untrained(source: str | Path) -> None:
    """Log that the recipe of a run is not the run: it names the weights that training began with."""
    path = Path(source)
    if path.name == "recipe.yaml" and (path.parent / "checkpoints").is_dir():
        log.warning(
            "%s is the recipe of a run, and gives the model before training; for the trained one give the folder %s",
            path,
            path.parent,
        )


def warn_of_random_weights(name: str, config: Any) -> None:
    """Log that a model comes from no file and has learned nothing. name: of its recipe, config: its model section."""
    if config.weights is None:
        log.warning(
            "%s names no weights (model.weights=null): this model is random, so its images are noise and its answers "
            "mean nothing; name the folder of a trained run instead, or give model.weights",
            name,
        )
