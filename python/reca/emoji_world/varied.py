"""The toy dataset `emoji-varied`: every pair large or, at four positions, small, on a dark and on a light background.

Captions do not state which, so a prompt has ten correct images. The codebook is fitted to both sizes and backgrounds.
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
        "There are ten images of every pair: small at four positions or large, on two backgrounds. Those of the same "
        "size and background consist of the same patches.",
        *ASSUMPTIONS[2:],
    ),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
