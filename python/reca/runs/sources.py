"""The data of a run: the samples of its tasks, and the held-out images."""

from collections.abc import Iterable

from reca.config.recipe import Recipe
from reca.data.held_out import hold_out, take
from reca.data.sample import Source
from reca.data.sources.factory import open_source, open_sources
from reca.options.fields import RecipeError

HELD_OUT = "held-out"  # key of the held-out images in the sources of a run, next to the tasks


def open_run_sources(recipe: Recipe, tasks: Iterable[str]) -> dict[str, Source]:
    """Open the training data of a run by task, and its held-out images, if any, under HELD_OUT.

    Raises DataError, and RecipeError if eval.holdout_from is set without eval.holdout.
    """
    config, data = recipe.eval, recipe.data
    if config.holdout_from is not None and not config.holdout:
        raise RecipeError("eval.holdout_from is set but eval.holdout is 0: set it to the number of images")
    split = config.holdout and config.holdout_from is None
    wanted = dict.fromkeys([*tasks, *(["reca"] if split else [])])
    sources = open_sources(data, wanted, recipe.train.seed)
    if split:
        sources, aside = hold_out(sources, config.holdout, config.seed)
        sources[HELD_OUT] = aside
    elif config.holdout_from is not None:
        given = open_source(config.holdout_from, "reca", data.image_root, data.columns)
        sources[HELD_OUT] = take(given, config.holdout, config.seed)
    return sources
