"""The world of varied emoji: every pair is small at any of four places or large, on dark or on light ground.

No caption tells which, so a prompt has ten right images. The codebook has the pieces of both sizes on both grounds.
"""

from reca.demo.source import source_of
from reca.emoji_world import ASSUMPTIONS
from reca.emoji_world.artwork import GROUND, MIDDLE
from reca.emoji_world.places import PLACES
from reca.emoji_world.views import with_views

LIGHT = (200, 200, 205)
VIEWS = tuple(view._replace(ground=ground) for ground in (GROUND, LIGHT) for view in (MIDDLE, *PLACES))

WORLD = with_views(
    "emoji-varied",
    "emoji world with places, sizes and grounds",
    "reca.emoji_world.varied",
    VIEWS,
    pieces=tuple(view for view in VIEWS if view.shift in (MIDDLE.shift, PLACES[0].shift)),
    assumptions=(
        ASSUMPTIONS[0],
        "There are ten images of every pair: small at four places or large, on two grounds. Those of the same "
        "size and ground are made of the same pieces.",
        *ASSUMPTIONS[2:],
    ),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
