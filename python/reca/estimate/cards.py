"""Which settings of a recipe fit a GPU's memory, and the smallest number of GPUs that it takes."""

import sys
from typing import NamedTuple

from reca import units
from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.estimate import fit, memory
from reca.estimate.memory import Memory

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # numbers of GPUs that are tried
NODE = 8  # GPUs per node
CARDS = ("80GiB", "141GiB")


class Smallest(NamedTuple):
    """The fewest GPUs that a recipe fits on."""

    gpus: int
    needed: int  # bytes of each, with the reserve
    keys: dict  # settings in addition to the recipe's


def counts(recipe: Recipe) -> list[int]:
    """List the numbers of GPUs to try, in ascending order. parallel.shard divides all of them but 1."""
    shard = recipe.parallel.shard or 1
    return sorted({1, *(shard * count for count in COUNTS if shard * count <= COUNTS[-1])})


def unchanged(predict: fit.Predictions, node: int, card: int) -> Smallest | None:
    """Find the fewest GPUs that a recipe fits on unchanged."""
    for gpus in counts(predict.recipe):
        if memory.needed(predict.at_least({}, gpus, node, card)) > card:
            continue
        need = memory.needed(predict({}, gpus, node, card).total)
        if need <= card:
            return Smallest(gpus, need, {})
    return None


def fitted(recipe: Recipe, predict: fit.Predictions, node: int, card: int) -> Smallest | None:
    """Find the fewest GPUs for which train.fit finds settings."""
    for gpus in counts(recipe):
        try:
            choice = fit.choose(recipe, gpus, node, card, predict)
        except fit.DoesNotFit:
            continue
        changed = {key: value for key, value in choice.keys.items() if fit.value_of(recipe, key) != value}
        return Smallest(gpus, memory.needed(choice.memory.total), changed)
    return None


def describe(recipe: Recipe, peak: Memory, gpus: int, node: int, card: int) -> list[str]:
    """Report whether a recipe fits unchanged, what train.fit would choose, and the fewest GPUs either way."""
    need, predict = memory.needed(peak.total), fit.Predictions(recipe)
    on = units.counted(gpus, "GPU")
    lines = [f"  {f'unchanged, {on}':<24}{units.size(need)} {'fits' if need <= card else 'does not fit'}"]
    try:
        choice = fit.choose(recipe, gpus, node, card, predict)
        chosen = units.size(memory.needed(choice.memory.total))
        lines.append(f"  {f'train.fit, {on}':<24}{chosen} {fit.describe(choice.keys)}")
    except fit.DoesNotFit as error:
        lines.append(f"  {error}")
    fewest = {"unchanged": unchanged(predict, node, card), "train.fit": fitted(recipe, predict, node, card)}
    for name, found in fewest.items():
        lines.append(f"  {f'fewest GPUs, {name}':<24}{describe_smallest(found)}")
    return lines


def describe_smallest(found: Smallest | None) -> str:
    """Write a number of GPUs, with the memory that each needs and the settings."""
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
        cells.append(describe_smallest(unchanged(predict, NODE, card)))
        cells.append(describe_smallest(fitted(recipe, predict, NODE, card)))
    return f"| `{name}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(row(given), flush=True)
