"""The toy dataset `emoji-shared-few`: as `emoji-shared`, but captions name two colours per kind instead of five."""

from reca.toy_datasets.emoji import ASSUMPTIONS
from reca.toy_datasets.emoji.shared import PIXELS, SHARED
from reca.toy_datasets.emoji.views import with_views
from reca.toy_datasets.source import source_of

DATASET = with_views(
    "emoji-shared-few",
    "reca.toy_datasets.emoji.shared_few",
    views=(PIXELS,),
    pieces=(PIXELS,),
    assumptions=(f"{SHARED} Captions name two colours of every emoji.", *ASSUMPTIONS[1:]),
    untold=6,
)
captioned, understood, unlabeled, unseen, pieces = (source_of(DATASET, name) for name in DATASET.splits)
