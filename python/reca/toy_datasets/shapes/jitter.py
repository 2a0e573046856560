"""The toy dataset `jitter`: shapes at random positions that captions do not state.

An encoder sees the position, so h_v can carry information that no prompt has. Positions are aligned with the grid of
image tokens.
"""

from dataclasses import replace
from functools import partial

from reca.toy_datasets import shapes
from reca.toy_datasets.shapes.splits import SPLITS
from reca.toy_datasets.source import source_of

DATASET = replace(
    shapes.DATASET,
    name="jitter",
    package="reca.toy_datasets.shapes.jitter",
    umms=("bagel", "show_o"),
    splits={name: partial(split, jitter=True) for name, split in SPLITS.items()},
    assumptions=(
        *shapes.DATASET.assumptions,
        "A single object is at one of sixteen positions, two objects at one of four per relation. Captions state only "
        "the relation.",
    ),
)
captioned, understood, unlabeled, unseen = (source_of(DATASET, name) for name in DATASET.splits)
