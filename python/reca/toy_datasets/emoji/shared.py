"""The toy dataset `emoji-shared`: patches so small that seen and held-out pairs share image codes.

Images have an effective width of 32 pixels, each rendered as a square of two by two, and patches are four of those
wide. Everything else is as in `emoji`.
"""

from reca.toy_datasets.emoji import ASSUMPTIONS
from reca.toy_datasets.emoji.artwork import MIDDLE
from reca.toy_datasets.emoji.views import with_views
from reca.toy_datasets.source import source_of

PIXELS = MIDDLE._replace(grain=2)
SHARED = "Images are 32 pixels wide, and image codes are patches of four pixels, most of which occur in several emoji."

DATASET = with_views(
    "emoji-shared",
    "reca.toy_datasets.emoji.shared",
    views=(PIXELS,),
    pieces=(PIXELS,),
    assumptions=(SHARED, *ASSUMPTIONS[1:]),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(DATASET, name) for name in DATASET.splits)
