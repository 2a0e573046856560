"""Variants of the toy dataset `emoji` with other images or captions."""

from dataclasses import replace
from functools import partial

from reca.toy_datasets import emoji
from reca.toy_datasets.dataset import ToyDataset
from reca.toy_datasets.emoji import judge, splits
from reca.toy_datasets.emoji.artwork import View
from reca.toy_datasets.emoji.prompts import prompts


def with_views(
    name: str,
    package: str,
    views: tuple[View, ...],
    pieces: tuple[View, ...],
    assumptions: tuple[str, ...],
    untold: int = splits.UNTOLD,
) -> ToyDataset:
    """Make a dataset with every pair in each of these views.

    pieces: views that the image tokenizer is fitted to. assumptions: replace those of `emoji` in the report.
    untold: held-out colours per kind.
    """
    return replace(
        emoji.DATASET,
        name=name,
        package=package,
        umms=("show_o",),
        held_out=partial(splits.held_out, untold=untold),
        prompts=partial(prompts, untold=untold),
        splits={
            "captioned": partial(splits.captioned, views=views, untold=untold),
            "understood": partial(splits.understood, views=views, untold=untold),
            "unlabeled": partial(splits.unlabeled, views=views),
            "unseen": partial(splits.unseen, grain=views[0].grain),
            "pieces": partial(splits.unlabeled, views=pieces),
        },
        codec_split="pieces",
        shows=partial(judge.shows, views=views),
        describe=partial(judge.describe, views=views),
        introduction=emoji.introduction(untold),
        assumptions=assumptions,
    )
