"""The toy dataset `shapes`: synthetic images of coloured shapes.

In recipes `reca.toy_world:unlabeled?seed=0` names a data source, and `reca.toy_world:TEMPLATES` the template sentences.
"""

from torch import Tensor

from reca.demo.captions import TEMPLATES, vocabulary
from reca.demo.source import source_of
from reca.demo.world import Prompt, World
from reca.toy_world import splits
from reca.toy_world.detector import detect, shows
from reca.toy_world.prompts import CATEGORIES, prompts
from reca.toy_world.scenes import COLOURS, RELATIONS, SHAPES, all_pairs, held_out_pairs

__all__ = ["TEMPLATES", "WORDS", "WORLD", "captioned", "understood", "unlabeled", "unseen"]

WORDS = vocabulary((*COLOURS, *SHAPES, *RELATIONS))


def _shows(image: Tensor, prompt: Prompt) -> bool:
    return shows(image, prompt.scene, prompt.colours, prompt.layout)


def _describe(image: Tensor) -> str:
    found = detect(image)
    if found is None:
        return "no object"
    return ", ".join(f"{f.thing.colour} {f.thing.kind}" for f in found) or "nothing"


WORLD = World(
    name="shapes",
    title="toy world",
    package="reca.toy_world",
    umms=("bagel", "harmon", "janus", "janusflow", "open_uni", "show_o"),
    things=tuple(all_pairs()),
    held_out=held_out_pairs,
    splits=splits.SPLITS,
    codec_split="understood",
    prompts=prompts,
    categories=CATEGORIES,
    caption_details=("half", "full"),
    shown=slice(1, None, 2),
    shows=_shows,
    describe=_describe,
    introduction=(
        "learned to generate coloured shapes from captions in which 18 of 48 colour-shape pairs never occur. Its "
        "understanding side was trained to name all 48."
    ),
    assumptions=("Understanding is easy here, so the fact that it is preserved is weak evidence.",),
)
captioned, understood, unlabeled, unseen = (source_of(WORLD, name) for name in WORLD.splits)
