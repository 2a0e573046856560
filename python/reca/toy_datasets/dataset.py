"""The definition of a toy dataset: its images, test prompts and judge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from reca.options.fields import RecipeError
from reca.options.names import hint
from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.split import Split

if TYPE_CHECKING:  # `reca --help` lists datasets and suites without importing torch
    from torch import Tensor

# name on the command line -> module with DATASET and the sources that recipes name
PACKAGES = {
    "emoji": "reca.toy_datasets.emoji",
    "shapes": "reca.toy_datasets.shapes",
    "jitter": "reca.toy_datasets.shapes.jitter",
    "emoji-shared": "reca.toy_datasets.emoji.shared",
    "emoji-shared-few": "reca.toy_datasets.emoji.shared_few",
    "emoji-places": "reca.toy_datasets.emoji.places",
    "emoji-varied": "reca.toy_datasets.emoji.varied",
}


class Prompt(NamedTuple):
    category: str
    pairs: str  # seen, held-out, or "" if no colour is named
    text: str
    scene: Scene
    colours: bool  # whether colours are judged
    layout: bool  # whether the layout is judged


@dataclass(frozen=True)
class ToyDataset:
    """A toy dataset.

    name             name on the command line
    package          module of its sources, as named in recipes
    umms             models that have a demo on it
    things           all colour-kind pairs
    held_out         seed -> things that captions never name
    splits           name -> seed -> split: captioned (pre-training of generation), understood (training of the
                     understanding side), unlabeled (post-training) and unseen (test images)
    codec_split      split that the image tokenizer is fitted to
    prompts          seed -> test prompts
    categories       categories of prompts; "overall" is the mean over them
    caption_details  caption_detail of the SFT variants other than sparse
    shown            slice of the held-out prompts that before_after.png shows
    shows            tells whether an image shows what a prompt asks for
    describe         describes an image in words
    introduction     what a model learned in pre-training; in the report it follows the model's description
    assumptions      assumptions and limitations, for the report
    credits          attribution and licences, for the report
    """

    name: str
    package: str
    umms: tuple[str, ...]
    things: tuple[Thing, ...]
    held_out: Callable[[int], frozenset[Thing]]
    splits: Mapping[str, Callable[[int], Split]]
    codec_split: str
    prompts: Callable[[int], list[Prompt]]
    categories: tuple[str, ...]
    caption_details: tuple[str, ...]
    shown: slice
    shows: "Callable[[Tensor, Prompt], bool]"
    describe: "Callable[[Tensor], str]"
    introduction: str
    assumptions: tuple[str, ...]
    credits: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Return the name in messages and reports."""
        return f"toy dataset {self.name}"

    def spec(self, split: str, seed: int | str, caption_detail: str | None = None) -> str:
        """Return the name of a source for recipes."""
        detail = f"&caption_detail={caption_detail}" if caption_detail else ""
        return f"{self.package}:{split}?seed={seed}{detail}"


class JudgedPrompt(NamedTuple):
    """A prompt, and the toy dataset whose judge tells whether an image shows it."""

    dataset: ToyDataset
    prompt: Prompt


def load_dataset(name: str) -> ToyDataset:
    """Load a toy dataset by name. Raises RecipeError for an unknown name."""
    if name not in PACKAGES:
        raise RecipeError(
            f"there is no toy dataset {name!r}; --dataset (DATASET= of make) is one of {', '.join(PACKAGES)}"
            f"{hint(name, PACKAGES)}"
        )
    return import_module(PACKAGES[name]).DATASET


def default_dataset(umm: str) -> ToyDataset:
    """Return the first toy dataset that has a demo of a model. Raises RecipeError if there is none."""
    datasets = [load_dataset(name) for name in PACKAGES]
    for dataset in datasets:
        if umm in dataset.umms:
            return dataset
    known = sorted({name for dataset in datasets for name in dataset.umms})
    raise RecipeError(
        f"there is no demo of {umm!r}; --umm (UMM= of make) is one of {', '.join(known)}{hint(umm, known)}"
    )
