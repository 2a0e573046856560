"""The world of emoji at places: every pair stands at any of four, and no caption tells which.

So a prompt has four right images, and what post-training reconstructs is not the only one that is asked for. Things
move by whole pieces of 16 pixels, and the codebook needs no more of them than at one place.
"""

from reca.demo.source import source_of
from reca.emoji_world import ASSUMPTIONS
from reca.emoji_world.artwork import View
from reca.emoji_world.views import with_views

SIZE, SHIFT = 0.72, 0.125  # 48 pixels, which begin at 0 or at 16
PLACES = tuple(View(SIZE, (right, down)) for right in (-SHIFT, SHIFT) for down in (-SHIFT, SHIFT))

WORLD = with_views(
    "emoji-places",
    "emoji world with places",
    "reca.emoji_world.places",
    PLACES,
    pieces=PLACES[:1],
    assumptions=(
        ASSUMPTIONS[0],
        "There are four images of every pair, which differ in the place alone, and the pieces that they are "
        "made of are the same.",
        *ASSUMPTIONS[2:],
    ),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
