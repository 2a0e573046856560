"""The world of shapes with jitter: where a thing stands is drawn for every image, and no caption tells it.

An encoder sees the place, so h_v can carry what a prompt never will. The grid of image tokens is kept: things move by
whole tokens.
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
        "One thing stands at any of sixteen places, two at any of four for each relation. Captions tell the relation "
        "alone.",
    ),
)
captioned, understood, unlabeled, unseen = (source_of(WORLD, name) for name in WORLD.splits)
