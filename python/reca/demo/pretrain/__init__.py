"""Pre-training of the demo: per model, a tiny one that understands more than it can generate.

What the demo knows of a model lies in its file here: SETUPS by the name of a world, each with a function
`pretrain(recipe, seed, folder, scale, progress) -> Adapter`, which saves in `folder` what `init_override` names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.demo.world import World
from reca.models.base import Adapter
from reca.options.fields import RecipeError

Progress = Callable[[int, float], None]  # (step, loss)

# Assumptions that several models share.
ALIGNED_H_V = (
    "The understanding side, {parts}, learned first and is frozen from then on, also while the model learns to "
    "generate. h_v is aligned with its text space: pre-training pulls every h_v token to the embedding of the word it "
    "stands for and reads words in h_v's place; later captions are generated from there too. Large models bring such "
    "alignment along; here it is made."
)
ALIGNED_JOINTLY = (
    "h_v is aligned with the text space: pre-training pulls every h_v token to the embedding of the word it stands "
    "for, reads words in h_v's place, and draws captions from there. Large models bring such alignment along; here it "
    "is made{how}."
)
LINEAR_LATENTS = (
    "Latents are linear in colour, so the generator may combine colours and shapes by itself, without RECA."
)


@dataclass(frozen=True)
class DemoSetup:
    """What the demo needs to know of a model.

    recipe          name of the tiny recipe that post-training runs
    steps           number of pre-training steps
    pretrain        makes the model and saves it
    init_override   override by which a recipe starts from what `pretrain` saved in {folder}
    sampling        sampling options for measuring
    description     the model, in a sentence of the report
    assumptions     what its pre-training assumes, in sentences of the report
    generation_arm  name, description and overrides of the arm whose h_v comes from the generation side; None: no such
    omitted_arms    arms that other models have and this one cannot have, with the reason
    cached          keep the features of the frozen encoders on disk: the same few images come again and again
    overrides       of the recipe, in pre-training and in all arms
    random_encoder  overrides by which the understanding encoder is random, for a second start; none: no such
    """

    recipe: str
    steps: int
    pretrain: Callable[[Recipe, int, Path, float, Progress], Adapter]
    init_override: str
    sampling: dict[str, Any]
    description: str
    assumptions: tuple[str, ...]
    generation_arm: tuple[str, str, tuple[str, ...]] | None = None
    omitted_arms: dict[str, str] = field(default_factory=dict)
    cached: bool = False
    overrides: tuple[str, ...] = ()
    random_encoder: tuple[str, ...] = ()


def demo_setup(umm: str, world: World) -> DemoSetup:
    """Return the setup of a model's demo. Raises RecipeError for a model without one in this world."""
    if umm not in world.umms:
        raise RecipeError(
            f"there is no demo of {umm!r} on the toy dataset {world.name!r}; --umm (UMM= of make) is one of "
            f"{', '.join(world.umms)}, or choose another --world (WORLD=)"
        )
    return import_module(f"reca.demo.pretrain.{umm}").SETUPS[world.name]


def run_overrides(recipe: str, world: World, seed: int, scale: float) -> tuple[str, ...]:
    """Return the overrides by which all arms of an experiment run a recipe in a world, on one thread each."""
    return (
        f"train.seed={seed}",
        f"train.steps={scaled(load_recipe(recipe).train.steps, scale)}",
        "train.threads=1",
        f"data.images={world.spec('unlabeled', seed)}",
        f"data.conversations={world.spec('understood', seed)}",
        f"data.captions={world.spec('unlabeled', seed, 'sparse')}",
        "data.workers=0",
    )


def scaled(count: int, scale: float, least: int = 2) -> int:
    """Return a share of a budget; all of it at scale 1."""
    return max(least, round(count * scale))
