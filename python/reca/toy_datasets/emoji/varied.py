"""The toy dataset `emoji-varied`: every pair large or, at four positions, small, on a dark and on a light background.

Captions do not state which, so a prompt has ten correct images. The codebook is fitted to both sizes and backgrounds.
"""

from reca.toy_datasets.emoji import ASSUMPTIONS
from reca.toy_datasets.emoji.artwork import GROUND, MIDDLE
from reca.toy_datasets.emoji.places import PLACES
from reca.toy_datasets.emoji.views import with_views
from reca.toy_datasets.source import source_of

LIGHT = (200, 200, 205)
VIEWS = tuple(view._replace(ground=ground) for ground in (GROUND, LIGHT) for view in (MIDDLE, *PLACES))

DATASET = with_views(
    "emoji-varied",
    "reca.toy_datasets.emoji.varied",
    VIEWS,
    pieces=tuple(view for view in VIEWS if view.shift in (MIDDLE.shift, PLACES[0].shift)),
    assumptions=(
        ASSUMPTIONS[0],
        "There are ten images of every pair: small at four positions or large, on two backgrounds. Those of the same "
        "size and background consist of the same patches.",
        *ASSUMPTIONS[2:],
    ),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(DATASET, name) for name in DATASET.splits)
