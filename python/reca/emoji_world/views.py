"""Worlds of emoji in which a pair has several images, of which captions tell nothing."""

from dataclasses import replace
from functools import partial

from reca import emoji_world
from reca.demo.world import World
from reca.emoji_world import judge, splits
from reca.emoji_world.artwork import View


def with_views(
    name: str, title: str, package: str, views: tuple[View, ...], pieces: tuple[View, ...], assumption: str
) -> World:
    """Make a world where every pair is in all of these views.

    pieces: those that an image tokenizer is fitted to. assumption: what is said of the images in place of the emoji
    world's own.
    """
    return replace(
        emoji_world.WORLD,
        name=name,
        title=title,
        package=package,
        umms=("show_o",),
        splits={
            "captioned": partial(splits.captioned, views=views),
            "understood": partial(splits.understood, views=views),
            "unlabeled": partial(splits.unlabeled, views=views),
            "unseen": splits.unseen,
            "pieces": partial(splits.unlabeled, views=pieces),
        },
        codec_split="pieces",
        shows=partial(judge.shows, views=views),
        describe=partial(judge.describe, views=views),
        assumptions=(emoji_world.WORLD.assumptions[0], assumption, *emoji_world.WORLD.assumptions[2:]),
    )
