"""The toy dataset `emoji-shared`: patches so small that seen and held-out pairs share image codes.

Images have an effective width of 32 pixels, each rendered as a square of two by two, and patches are four of those
wide. Everything else is as in `emoji`.
"""

from reca.demo.source import source_of
from reca.emoji_world import ASSUMPTIONS
from reca.emoji_world.artwork import MIDDLE
from reca.emoji_world.views import with_views

PIXELS = MIDDLE._replace(grain=2)
SHARED = "Images are 32 pixels wide, and image codes are patches of four pixels, most of which occur in several emoji."

WORLD = with_views(
    "emoji-shared",
    "emoji world of shared codes",
    "reca.emoji_world.shared",
    views=(PIXELS,),
    pieces=(PIXELS,),
    assumptions=(SHARED, *ASSUMPTIONS[1:]),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
