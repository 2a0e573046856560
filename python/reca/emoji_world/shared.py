"""The world of emoji whose image codes are shared: pieces so small that a seen pair and a held-out one have the same.

Images have 32 pixels, each drawn as a square of two by two, and pieces are four of those wide. All else is as in the
emoji world.
"""

from reca.demo.source import source_of
from reca.emoji_world import ASSUMPTIONS
from reca.emoji_world.artwork import MIDDLE
from reca.emoji_world.views import with_views

PIXELS = MIDDLE._replace(grain=2)
SHARED = "Images have 32 pixels, and image codes are pieces of four, most of which emoji share."

WORLD = with_views(
    "emoji-shared",
    "emoji world of shared codes",
    "reca.emoji_world.shared",
    views=(PIXELS,),
    pieces=(PIXELS,),
    assumptions=(SHARED, *ASSUMPTIONS[1:]),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
