"""The toy dataset `emoji-places`: every pair at each of four positions that captions do not state.

So a prompt has four correct images, not only the one that post-training reconstructs. Positions differ by whole patches
of 16 pixels, so the codebook needs no more entries than for one position.
"""

from reca.toy_datasets.emoji import ASSUMPTIONS
from reca.toy_datasets.emoji.artwork import View
from reca.toy_datasets.emoji.views import with_views
from reca.toy_datasets.source import source_of

SIZE, SHIFT = 0.72, 0.125  # 46 of 64 pixels; positions are 16 pixels apart
PLACES = tuple(View(SIZE, (right, down)) for right in (-SHIFT, SHIFT) for down in (-SHIFT, SHIFT))

DATASET = with_views(
    "emoji-places",
    "reca.toy_datasets.emoji.places",
    PLACES,
    pieces=PLACES[:1],
    assumptions=(
        ASSUMPTIONS[0],
        "There are four images of every pair. They differ only in position and consist of the same patches.",
        *ASSUMPTIONS[2:],
    ),
)
captioned, understood, unlabeled, unseen, pieces = (source_of(DATASET, name) for name in DATASET.splits)
