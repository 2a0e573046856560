"""What an embedded world is: its images, what is asked of a model there, and who judges what the model draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from reca.demo.scene import Scene, Thing
from reca.demo.splits import Split
from reca.options import RecipeError

if TYPE_CHECKING:  # the names of worlds and suites are part of `reca --help`, which needs no torch
    from torch import Tensor

# name on the command line -> module with WORLD, whose functions are the sources that recipes name
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
    pairs: str  # seen, held-out, or "" where no colour is asked
    text: str
    scene: Scene
    colours: bool  # judged by
    layout: bool  # judged by


@dataclass(frozen=True)
class World:
    """An embedded world.

    name             on the command line
    title            in sentences
    package          or module that recipes name its sources by
    umms             models that have a demo in it
    things           every pair of a colour and a kind
    held_out         seed -> the things that captions never show
    splits           name -> seed -> split: captioned (what is drawn from captions), understood (what the understanding
                     side can name), unlabeled (what post-training reconstructs) and unseen (what no training sees)
    codec_split      the split that an image tokenizer is fitted to
    prompts          seed -> what a model is asked to draw
    categories       of prompts; "overall" is the mean over them
    caption_details  of the arms of SFT beside the sparse one
    shown            which of the held-out prompts the image beside the report shows, by their place
    shows            whether an image shows what a prompt asks for
    describe         what an image shows, in words
    introduction     what a model learned in pre-training, in sentences of the report that begin after its name
    assumptions      what this world assumes, in sentences of the report
    credits          whose work it shows, in sentences of the report
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
        """Name a source as recipes do."""
        detail = f"&caption_detail={caption_detail}" if caption_detail else ""
        return f"{self.package}:{split}?seed={seed}{detail}"


class Asked(NamedTuple):
    """A prompt, and the world whose judge says whether an image shows it."""

    world: World
    prompt: Prompt


def load_world(name: str) -> World:
    """Return a world by its name. Raises RecipeError for one that does not exist."""
    if name not in PACKAGES:
        raise RecipeError(f"there is no toy dataset {name!r}; --world (WORLD= of make) is one of {', '.join(PACKAGES)}")
    return import_module(PACKAGES[name]).WORLD


def default_world(umm: str) -> World:
    """Return the first world that has a demo of a model. Raises RecipeError for a model without one."""
    worlds = [load_world(name) for name in PACKAGES]
    for world in worlds:
        if umm in world.umms:
            return world
    known = sorted({name for world in worlds for name in world.umms})
    raise RecipeError(f"there is no demo of {umm!r}; --umm (UMM= of make) is one of {', '.join(known)}")
