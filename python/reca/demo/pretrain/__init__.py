"""Pre-training for the demo: tiny models that understand more than they can generate, one module per model.

Each module has SETUPS, a mapping from toy datasets to `DemoSetup`, each with a function
`pretrain(recipe, seed, folder, scale, progress) -> Adapter`, which saves in `folder` what `init_override` loads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.options.names import hint
from reca.toy_datasets.dataset import ToyDataset

Progress = Callable[[int, float], None]  # (step, loss)

# Assumptions shared by several models.
ALIGNED_H_V = (
    "The understanding side, {parts}, is trained first and frozen from then on, also while the model learns to "
    "generate. h_v is aligned with its text space: pre-training pulls every h_v token to the embedding of a word of "
    "the caption and reads words in place of h_v; later, images are generated from words in that place, too. Large "
    "models already have such alignment; here it is trained explicitly."
)
ALIGNED_JOINTLY = (
    "h_v is aligned with the text space: pre-training pulls every h_v token to the embedding of a word of the caption, "
    "reads words in place of h_v, and generates images from them. Large models already have such alignment; here it "
    "is trained explicitly{how}."
)
LINEAR_LATENTS = "Latents are linear in colour, so the generator may combine colours and shapes without RECA."


@dataclass(frozen=True)
class DemoSetup:
    """The demo's settings for a model on a toy dataset.

    recipe              name of the tiny recipe for post-training
    steps               number of pre-training steps
    pretrain            trains the model and saves it
    init_override       override that makes a recipe start from what `pretrain` saved in {folder}
    sampling            sampling options for measurements
    description         the model, as the beginning of a sentence in the report
    assumptions         assumptions of pre-training, for the report
    generation_variant  name, description and overrides of the variant with h_v from the generation side; None: missing
    omitted_variants    variants that this model lacks, with the reason
    cached              cache the features of frozen encoders on disk, as the few images are repeated often
    overrides           recipe overrides for pre-training and all variants
    random_encoder      overrides for a second pre-trained model, with a random understanding encoder; (): none
    """

    recipe: str
    steps: int
    pretrain: Callable[[Recipe, int, Path, float, Progress], Adapter]
    init_override: str
    sampling: dict[str, Any]
    description: str
    assumptions: tuple[str, ...]
    generation_variant: tuple[str, str, tuple[str, ...]] | None = None
    omitted_variants: dict[str, str] = field(default_factory=dict)
    cached: bool = False
    overrides: tuple[str, ...] = ()
    random_encoder: tuple[str, ...] = ()


def demo_setup(umm: str, dataset: ToyDataset) -> DemoSetup:
    """Return the setup of a model's demo. Raises RecipeError if the toy dataset has no demo of the model."""
    if umm not in dataset.umms:
        raise RecipeError(
            f"there is no demo of {umm!r} on the toy dataset {dataset.name!r}; --umm (UMM= of make) is one of "
            f"{', '.join(dataset.umms)}, or choose another --dataset (DATASET=){hint(umm, dataset.umms)}"
        )
    return import_module(f"reca.demo.pretrain.{umm}").SETUPS[dataset.name]


def run_overrides(recipe: str, dataset: ToyDataset, seed: int, scale: float) -> tuple[str, ...]:
    """Return the overrides common to all variants: seed, number of steps, data and a single thread."""
    return (
        f"train.seed={seed}",
        f"train.steps={scaled(load_recipe(recipe).train.steps, scale)}",
        "train.threads=1",
        f"data.images={dataset.spec('unlabeled', seed)}",
        f"data.conversations={dataset.spec('understood', seed)}",
        f"data.captions={dataset.spec('unlabeled', seed, 'sparse')}",
        "data.workers=0",
    )


def scaled(count: int, scale: float, least: int = 2) -> int:
    """Return the fraction `scale` of a count, but at least `least`."""
    return max(least, round(count * scale))
