"""The definition of a toy dataset: its images, test prompts and judge."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from reca.demo.scene import Scene, Thing
from reca.demo.splits import Split
from reca.options.fields import RecipeError

if TYPE_CHECKING:  # `reca --help` lists datasets and suites without importing torch
    from torch import Tensor

# name on the command line -> module with WORLD and the sources that recipes name
PACKAGES = {
    "emoji": "reca.emoji_world",
    "shapes": "reca.toy_world",
    "jitter": "reca.toy_world.jitter",
    "emoji-shared": "reca.emoji_world.shared",
    "emoji-shared-few": "reca.emoji_world.shared_few",
    "emoji-places": "reca.emoji_world.places",
    "emoji-varied": "reca.emoji_world.varied",
}


class Prompt(NamedTuple):
    category: str
    pairs: str  # seen, held-out, or "" if no colour is named
    text: str
    scene: Scene
    colours: bool  # whether colours are judged
    layout: bool  # whether the layout is judged


@dataclass(frozen=True)
class World:
    """A toy dataset.

    name             name on the command line
    title            name in messages and reports of evaluations
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
    title: str
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

    def spec(self, split: str, seed: int | str, caption_detail: str | None = None) -> str:
        """Return the name of a source for recipes."""
        detail = f"&caption_detail={caption_detail}" if caption_detail else ""
        return f"{self.package}:{split}?seed={seed}{detail}"


class Asked(NamedTuple):
    """A prompt, and the toy dataset whose judge tells whether an image shows it."""

    world: World
    prompt: Prompt


def load_world(name: str) -> World:
    """Load a toy dataset by name. Raises RecipeError for an unknown name."""
    if name not in PACKAGES:
        raise RecipeError(f"there is no toy dataset {name!r}; --world (WORLD= of make) is one of {', '.join(PACKAGES)}")
    return import_module(PACKAGES[name]).WORLD


def default_world(umm: str) -> World:
    """Return the first toy dataset that has a demo of a model. Raises RecipeError if there is none."""
    worlds = [load_world(name) for name in PACKAGES]
    for world in worlds:
        if umm in world.umms:
            return world
    known = sorted({name for world in worlds for name in world.umms})
    raise RecipeError(f"there is no demo of {umm!r}; --umm (UMM= of make) is one of {', '.join(known)}")
