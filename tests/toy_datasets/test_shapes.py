"""Captions, splits and the arithmetic of the measurement."""

import random

import pytest

from reca.config.recipe_files import load_recipe
from reca.data.errors import DataError
from reca.data.pixels import open_rgb
from reca.data.sources.factory import open_source
from reca.demo.measure import Rate
from reca.toy_datasets.captions import TEMPLATES, caption, phrase
from reca.toy_datasets.dataset import Prompt
from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.shapes import WORDS, jitter, splits
from reca.toy_datasets.shapes.detector import detect
from reca.toy_datasets.shapes.prompts import CATEGORIES, prompts
from reca.toy_datasets.shapes.scenes import held_out_pairs

RED, BLUE = Thing("red", "square"), Thing("blue", "circle")


def test_captions():
    scene = Scene((RED, BLUE), "left_of")
    assert caption(scene) == "a red square left_of a blue circle"
    assert caption(scene, coloured={RED}) == "a red square left_of a circle"
    assert caption(scene, coloured=()) == "a square left_of a circle"


def test_the_recipe_knows_every_word():
    assert set(load_recipe("show_o_tiny").model.words) == set(WORDS)


def test_phrases_add_words_around_and_change_nothing_inside():
    rng = random.Random(0)
    said = [phrase("a red square", rng) for _ in range(100)]
    assert all("a red square" in s for s in said) and len(set(said)) > 20
    assert {w for s in said for w in s.split()} <= set(WORDS)


def test_captioned_images_hold_no_held_out_pair_and_unlabeled_ones_do():
    held = held_out_pairs(3)
    captioned, unlabeled = splits.captioned(3), splits.unlabeled(3)
    assert not any(t in held for i in range(300) for t in captioned.scene(i).things)
    assert any(t in held for i in range(50) for t in unlabeled.scene(i).things)


def test_jitter_moves_things_and_changes_nothing_that_is_said():
    still, moved = splits.unlabeled(2), jitter.DATASET.splits["unlabeled"](2)
    corners = set()
    for index in range(200):
        scene = moved.scene(index)
        assert scene == still.scene(index)
        found = detect(moved.image(index))
        prompt = Prompt("position", "seen", caption(scene), scene, True, True)
        assert jitter.DATASET.shows(moved.image(index), prompt), index
        corners.add((scene.relation, *sorted((round(f.row / 4), round(f.column / 4)) for f in found)))
    assert [sum(corner[0] == relation for corner in corners) for relation in (None, "left_of", "above")] == [16, 4, 4]
    source = open_source("reca.toy_datasets.shapes.jitter:unlabeled?seed=2", "t2i")
    assert source[5].text == open_source("reca.toy_datasets.shapes:unlabeled?seed=2", "t2i")[5].text
    assert source[5].image == moved.png(5) and source[6].image == moved.png(6) != still.png(6)


def test_splits_do_not_share_images():
    a, b = splits.understood(0), splits.unseen(0)
    assert [a.scene(i) for i in range(50)] != [b.scene(i) for i in range(50)]


def test_sources_give_each_kind_its_text():
    held = held_out_pairs(1)
    bare = open_source("reca.toy_datasets.shapes:unlabeled?seed=1", "reca")[0]
    assert bare.text is None and open_rgb(bare.image).size == (20, 20)
    sparse = open_source("reca.toy_datasets.shapes:unlabeled?seed=1&caption_detail=sparse", "t2i")
    split = sparse.split
    for i in range(200):
        for thing in split.scene(i).things:
            assert thing not in held or f"{thing.colour} {thing.kind}" not in sparse[i].text
    talk = open_source("reca.toy_datasets.shapes:understood?seed=1", "i2t")[0].text
    assert talk[0].answer == caption(splits.understood(1).scene(0))
    assert (
        open_source("reca.toy_datasets.shapes:unlabeled?seed=1", "t2i")[5]
        == open_source("reca.toy_datasets.shapes:unlabeled?seed=1", "t2i")[5]
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "has no 'nothing'"),
        ("unlabelled", "has no 'unlabelled'; did you mean unlabeled"),
        (
            "unlabeled?caption_detail=some",
            "caption_detail=some of the toy dataset shapes must be one of sparse, none, half",
        ),
        ("unlabeled?seed=x", "seed=x of the toy dataset shapes must be a whole number"),
        ("unlabeled?colour=red", "unexpected keyword argument 'colour'.*seed: int = 0, caption_detail"),
    ],
)
def test_mistakes_in_a_spec_are_named(spec, words):
    with pytest.raises(DataError, match=words):
        open_source(f"reca.toy_datasets.shapes:{spec}", "reca")


def test_prompts_are_independent_and_fixed():
    made = prompts(0)
    assert made == prompts(0) and made != prompts(1)
    assert {p.category for p in made} == set(CATEGORIES)
    held = held_out_pairs(0)
    for p in made:
        if p.pairs:
            assert all((t in held) == (p.pairs == "held-out") for t in p.scene.things)
    texts = {c: [p.text for p in made if p.category == c] for c in ("attribution", "position")}
    assert texts["attribution"] != texts["position"]


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (74, 102, 0.6320, 0.8028)],
)
def test_wilson(hits, trials, low, high):
    assert Rate(hits, trials).wilson() == pytest.approx((low, high), abs=2e-3)


def test_templates_fit_the_tiny_recipe():
    recipe = load_recipe("show_o_tiny")
    assert max(len(t.split()) for t in TEMPLATES) + 5 + 5 <= recipe.model.max_reca_tokens
