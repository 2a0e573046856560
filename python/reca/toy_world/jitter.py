"""The toy dataset `jitter`: shapes at random positions that captions do not state.

An encoder sees the position, so h_v can carry information that no prompt has. Positions are aligned with the grid of
image tokens.
"""

from dataclasses import replace
from functools import partial

from reca import toy_world
from reca.demo.source import source_of
from reca.toy_world.splits import SPLITS

WORLD = replace(
    toy_world.WORLD,
    name="jitter",
    title="toy world with jitter",
    package="reca.toy_world.jitter",
    umms=("bagel", "show_o"),
    splits={name: partial(split, jitter=True) for name, split in SPLITS.items()},
    assumptions=(
        *toy_world.WORLD.assumptions,
        "A single object is at one of sixteen positions, two objects at one of four per relation. Captions state only "
        "the relation.",
    ),
)
captioned, understood, unlabeled, unseen = (source_of(WORLD, name) for name in WORLD.splits)
