"""The world of emoji at places: every pair stands at any of four, and no caption tells which.

So a prompt has four right pictures, and what post-training reconstructs is not the only one that is asked for. Things
move by whole pieces of 16 pixels, and the codebook needs no more of them than at one place.
"""

from dataclasses import replace
from functools import partial

from reca import emoji_world
from reca.demo.source import source_of
from reca.emoji_world import judge, splits
from reca.emoji_world.artwork import View

SIZE, SHIFT = 0.72, 0.125  # 48 pixels, which begin at 0 or at 16
PLACES = tuple(View(SIZE, (right, down)) for right in (-SHIFT, SHIFT) for down in (-SHIFT, SHIFT))

WORLD = replace(
    emoji_world.WORLD,
    name="emoji-places",
    title="emoji world with places",
    package="reca.emoji_world.places",
    umms=("show_o",),
    splits={
        "captioned": partial(splits.captioned, views=PLACES),
        "understood": partial(splits.understood, views=PLACES),
        "unlabeled": partial(splits.unlabeled, views=PLACES),
        "unseen": splits.unseen,
        "pieces": partial(splits.unlabeled, views=PLACES[:1]),
    },
    codec_split="pieces",
    shows=partial(judge.shows, views=PLACES),
    describe=partial(judge.describe, views=PLACES),
    assumptions=(
        emoji_world.WORLD.assumptions[0],
        "There are four pictures of every pair, which differ in the place alone, and the pieces that they are made of "
        "are the same.",
        *emoji_world.WORLD.assumptions[2:],
    ),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
