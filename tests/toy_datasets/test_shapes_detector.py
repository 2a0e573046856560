"""The judge of the demo must itself be judged: on drawn truth, and on images that are wrong in one way."""

import random

import pytest
import torch

from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.shapes.detector import detect, shows
from reca.toy_datasets.shapes.scenes import COLOURS, RELATIONS, SHAPES, all_pairs, draw_scene, held_out_pairs, render


def scenes(n, seed=0):
    rng = random.Random(seed)
    return [draw_scene(rng, all_pairs()) for _ in range(n)]


def noisy(scene, seed=0):
    return render(scene, torch.Generator().manual_seed(seed))


def test_rendered_truth_is_recognised():
    drawn = [shows(noisy(s, i), s, colours=True, layout=True) for i, s in enumerate(scenes(400))]
    assert sum(drawn) >= 0.995 * len(drawn)


def test_every_pair_in_every_place():
    for pair in all_pairs():
        other = Thing("white", "ring")
        for scene in (
            Scene((pair,)),
            *(Scene((pair, other), r) for r in RELATIONS),
            *(Scene((other, pair), r) for r in RELATIONS),
        ):
            assert shows(render(scene), scene, True, True), scene


RED, BLUE = Thing("red", "square"), Thing("blue", "circle")
PAIR = Scene((RED, BLUE), "above")


@pytest.mark.parametrize(
    ("drawn", "colours", "layout", "verdict"),
    [
        (Scene((RED, BLUE), "above"), True, True, True),
        (Scene((BLUE, RED), "above"), True, True, False),  # swapped
        (Scene((BLUE, RED), "above"), True, False, True),  # swapped, layout not asked
        (Scene((RED, BLUE), "left_of"), True, True, False),  # the other relation
        (Scene((Thing("blue", "square"), Thing("red", "circle")), "above"), True, True, False),  # colours exchanged
        (Scene((Thing("blue", "square"), Thing("red", "circle")), "above"), False, True, True),  # colours not asked
        (Scene((Thing("red", "diamond"), BLUE), "above"), True, True, False),  # wrong shape
        (Scene((RED,)), True, True, False),  # one is missing
    ],
)
def test_what_was_asked_is_what_is_judged(drawn, colours, layout, verdict):
    assert shows(noisy(drawn), PAIR, colours, layout) == verdict


@pytest.mark.parametrize(("relation", "down", "right"), [("above", 1, 0), ("left_of", 0, 1)])
def test_a_thing_that_stands_aside_is_in_no_relation(relation, down, right):
    """Less than half of an object's side is allowed: on a diagonal, each is neither above nor left of the other."""
    for aside, verdict in ((0, True), (3, True), (4, False), (12, False)):
        corners = [(0, 0), (12 * down + aside * right, 12 * right + aside * down)]
        image = render(PAIR, corners=corners)
        assert shows(image, Scene((RED, BLUE), relation), True, True) == verdict, aside
        assert shows(image, Scene((RED, BLUE), relation), True, False)


def test_an_extra_object_is_too_many():
    assert not shows(render(PAIR), Scene((RED,)), True, True)


def test_a_shifted_object_is_still_found():
    for down, right in ((1, 0), (0, -2), (-3, 3)):
        image = torch.roll(render(Scene((RED,))), (down, right), (1, 2))
        assert [f.thing for f in detect(image)] == [RED]


def test_a_two_coloured_object_is_none():
    image = render(Scene((RED,)))
    blue = torch.tensor(COLOURS["blue"]).mul(255).byte()[:, None, None]
    image[:, 8:12, 8:16] = blue
    assert detect(image) is None


def test_noise_and_blank_images_show_nothing():
    static = torch.randint(0, 256, (3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert not shows(static, Scene((RED,)), False, False)
    assert detect(torch.full((3, 20, 20), 20, dtype=torch.uint8)) == []


def test_specks_are_not_objects():
    image = render(Scene((RED,)))
    image[:, 0, 0:3] = 255
    assert shows(image, Scene((RED,)), True, True)


def test_held_out_pairs_are_three_a_shape_and_even_in_colour():
    for seed in range(5):
        held = held_out_pairs(seed)
        assert [sum(p.kind == s for p in held) for s in SHAPES] == [3] * 6
        assert {sum(p.colour == c for p in held) for c in COLOURS} <= {2, 3}
        assert held == held_out_pairs(seed) and held != held_out_pairs(seed + 1)
