"""The toy dataset `emoji-shared-few`: as `emoji-shared`, but captions name two colours per kind instead of five."""

from reca.demo.source import source_of
from reca.emoji_world import ASSUMPTIONS
from reca.emoji_world.shared import PIXELS, SHARED
from reca.emoji_world.views import with_views

WORLD = with_views(
    "emoji-shared-few",
    "emoji world of shared codes and few colours",
    "reca.emoji_world.shared_few",
    views=(PIXELS,),
    pieces=(PIXELS,),
    assumptions=(f"{SHARED} Captions name two colours of every emoji.", *ASSUMPTIONS[1:]),
    untold=6,
)
captioned, understood, unlabeled, unseen, pieces = (source_of(WORLD, name) for name in WORLD.splits)
