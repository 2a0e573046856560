"""Which settings of a recipe fit a card, and the smallest number of cards that it takes."""

import sys
from typing import NamedTuple

from reca import fit, memory, units
from reca.config import FIT_CHANGES, Recipe
from reca.memory import Memory
from reca.recipe_files import load_recipe

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # numbers of cards that are tried
NODE = 8  # of them in a machine
CARDS = ("80GiB", "141GiB")


class Smallest(NamedTuple):
    """The fewest cards that a recipe fits on."""

    gpus: int
    needed: int  # bytes of each, with the reserve
    keys: dict  # settings, beside the recipe's


def as_it_is(predict: fit.Predictions, node: int, card: int) -> Smallest | None:
    """Find the fewest cards that hold a recipe as it is written."""
    for gpus in COUNTS:
        if memory.needed(predict.at_least({}, gpus, node, card)) > card:
            continue
        need = memory.needed(predict({}, gpus, node, card).total)
        if need <= card:
            return Smallest(gpus, need, {})
    return None


def fitted(recipe: Recipe, predict: fit.Predictions, node: int, card: int) -> Smallest | None:
    """Find the fewest cards for which train.fit finds settings."""
    for gpus in COUNTS:
        try:
            choice = fit.choose(recipe, gpus, node, card, predict)
        except fit.DoesNotFit:
            continue
        changed = {key: value for key, value in choice.keys.items() if fit.value_of(recipe, key) != value}
        return Smallest(gpus, memory.needed(choice.memory.total), changed)
    return None


def describe(recipe: Recipe, peak: Memory, gpus: int, node: int, card: int) -> list[str]:
    """Say whether a recipe fits as it is, what train.fit would choose, and how few cards it takes either way."""
    need, predict = memory.needed(peak.total), fit.Predictions(recipe)
    lines = [f"  as it is on {gpus:<10}{units.size(need):>18} {'fits' if need <= card else 'does not fit'}"]
    try:
        choice = fit.choose(recipe, gpus, node, card, predict)
        chosen = units.size(memory.needed(choice.memory.total))
        lines.append(f"  train.fit on {gpus:<9}{chosen:>18} {fit.describe(choice.keys)}")
    except fit.DoesNotFit as error:
        lines.append(f"  {error}")
    fewest = {"as it is": as_it_is(predict, node, card), "train.fit": fitted(recipe, predict, node, card)}
    for name, found in fewest.items():
        lines.append(f"  fewest, {name:<14}{describe_smallest(found)}")
    return lines


def describe_smallest(found: Smallest | None) -> str:
    """Write a number of cards, with what each needs and what has to be set."""
    if found is None:
        return f"more than {COUNTS[-1]}"
    keys = f": {fit.describe(found.keys)}" if found.keys else ""
    return f"{found.gpus} ({units.size(found.needed)}){keys}"


def row(name: str) -> str:
    """Write a recipe's line of the table in docs/memory.md: Markdown."""
    cells, recipe = [], load_recipe(name)
    predict = fit.Predictions(recipe)
    for text in CARDS:
        card = units.parse_size(text)
        cells.append(describe_smallest(as_it_is(predict, NODE, card)))
        found = fitted(recipe, predict, NODE, card)
        if found is None or found.gpus > 1:
            allowed = fitted(fit.with_keys(recipe, {"train.fit_allow": list(FIT_CHANGES)}), predict, NODE, card)
            if allowed is not None and (found is None or allowed.gpus < found.gpus):
                found = allowed
        cells.append(describe_smallest(found))
    return f"| `{name}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(row(given), flush=True)
