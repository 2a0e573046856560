"""The emoji dataset: its images, who judges them, and that held-out pairs are never named."""

import random

import pytest
import torch
import torch.nn.functional as F

from reca.config.recipe_files import load_recipe
from reca.data.errors import DataError
from reca.data.sources.factory import open_source
from reca.demo.pretrain import demo_setup
from reca.demo.pretrain.codebook import fit_codebook
from reca.demo.pretrain.language import WORDS as FACT_WORDS
from reca.models.common.patch_codebook import CodebookSizes, PatchCodebook
from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import Prompt
from reca.toy_datasets.emoji import DATASET, WORDS, artwork, judge, places, shared, shared_few, varied
from reca.toy_datasets.scene import Scene, Thing
from tests.toy_datasets.artwork import needs_artwork

pytestmark = needs_artwork
HUE_NAMES = list(artwork.HUES)


@pytest.fixture(scope="module")
def images():
    return torch.stack([artwork.draw(thing) for thing in artwork.THINGS])


def shows(image, thing, colours=True):
    return judge.shows(image, Prompt("colour", "seen", "", Scene((thing,)), colours, False))


def test_true_images_are_recognised_by_the_nearest_and_by_the_hue(images):
    assert [judge.nearest(image)[0] for image in images] == list(artwork.THINGS)
    assert [judge.main_colour(image) for image in images] == [thing.colour for thing in artwork.THINGS]


def test_the_nearest_image_is_that_of_the_least_squares(images):
    generator = torch.Generator().manual_seed(0)
    for number, image in enumerate(images[::7]):
        noise = torch.randint(-60, 61, image.shape, generator=generator)
        given = (image + noise * (number % 4) // 3).clamp(0, 255).to(torch.uint8)
        distances = (images.double() - given).square().mean((1, 2, 3)) / 255**2
        thing, distance = judge.nearest(given)
        assert thing == artwork.THINGS[int(distances.argmin())]
        assert distance == pytest.approx(float(distances.min()), rel=1e-4, abs=1e-9)


def test_images_are_recognised_after_the_codec(images):
    sizes = load_recipe("show_o_emoji_tiny").model.patches
    codec = PatchCodebook(CodebookSizes(sizes.size, sizes.entries))
    fit_codebook(codec, images, rounds=0)  # the patches that are far apart; rounds of k-means come nearer still
    decoded = codec.decode(codec.encode(images.float() / 127.5 - 1))
    decoded = ((decoded + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    hits = [shows(image, thing) for image, thing in zip(decoded, artwork.THINGS, strict=True)]
    assert sum(hits) >= 0.99 * len(hits)


def test_another_colour_or_kind_is_not_what_was_asked(images):
    for image, thing in zip(images, artwork.THINGS, strict=True):
        next_colour = HUE_NAMES[(HUE_NAMES.index(thing.colour) + 1) % 8]
        assert not shows(image, Thing(next_colour, thing.kind))
        assert shows(image, Thing(next_colour, thing.kind), colours=False)
    assert not shows(images[0], Thing("red", "heart"), colours=False)


def test_the_hue_is_looked_at_beside_the_nearest_image(images, monkeypatch):
    """A image of two colours is of none, also where the nearest true image says otherwise."""
    thing = Thing("red", "heart")
    red, green = (images[artwork.THINGS.index(Thing(colour, "heart"))] for colour in ("red", "green"))
    half = red.clone()
    half[:, ::2] = green[:, ::2]
    assert judge.main_colour(half) is None
    monkeypatch.setattr(judge, "nearest", lambda *_: (thing, 0.0))
    assert shows(red, thing) and not shows(half, thing, colours=False) and not shows(green, thing)


def test_blank_and_random_images_show_nothing():
    blank = torch.full((3, artwork.SIDE, artwork.SIDE), 20, dtype=torch.uint8)
    static = torch.randint(0, 256, blank.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert judge.main_colour(blank) is None
    assert [judge.describe(image) for image in (blank, static)] == ["no emoji"] * 2


def test_pieces_of_other_things_are_noticed(images):
    """With half of their pieces from another kind, one image in twenty passes at most."""
    rng, pieces = random.Random(0), F.unfold(images.float(), 16, stride=16)
    passed = 0
    for number, thing in enumerate(artwork.THINGS):
        mixed = pieces[number].clone()
        filled = [c for c in range(16) if pieces[number, :, c].std() > 20]
        for place in rng.sample(filled, len(filled) // 2):
            mixed[:, place] = pieces[(number + 8 * rng.randint(1, 23)) % len(pieces), :, place]
        image = F.fold(mixed[None], (64, 64), 16, stride=16)[0].to(torch.uint8)
        passed += shows(image, thing)
    assert passed <= 0.05 * len(artwork.THINGS)


def test_held_out_pairs_are_three_a_kind_and_even_in_colour():
    for seed in range(3):
        held = DATASET.held_out(seed)
        assert {kind: sum(t.kind == kind for t in held) for kind in artwork.KINDS} == dict.fromkeys(artwork.KINDS, 3)
        assert {colour: sum(t.colour == colour for t in held) for colour in HUE_NAMES} == dict.fromkeys(HUE_NAMES, 9)


def test_held_out_pairs_are_never_named():
    """Neither where the model learns to draw nor where it learns to understand, before and after."""
    held, texts = DATASET.held_out(1), []
    for split, task, detail in (
        ("captioned", "t2i", "full"),
        ("understood", "i2t", "full"),
        ("unlabeled", "t2i", "sparse"),
        ("unlabeled", "t2i", "none"),
    ):
        source = open_source(f"reca.toy_datasets.emoji:{split}?seed=1&caption_detail={detail}", task)
        texts += [text if isinstance(text := source[i].text, str) else text[0].answer for i in range(len(source))]
    assert len(texts) == 120 + 3 * 120 + 2 * 192
    assert not [text for text in texts if any(f"{thing.colour} {thing.kind}" in text for thing in held)]


def test_post_training_sees_every_thing_once_without_words():
    source = open_source("reca.toy_datasets.emoji:unlabeled?seed=1", "reca")
    assert len(source) == 192 and len({source[i].image for i in range(192)}) == 192
    assert {source.split.scene(i).things[0] for i in range(192)} == set(artwork.THINGS)
    assert source[0].text is None and source[0].image is source[0].image  # drawn once


def test_images_of_understanding_differ_from_those_that_are_asked_for():
    understood, unseen = DATASET.splits["understood"](0), DATASET.splits["unseen"](0)
    one = [understood.image(i) for i in range(3)]
    assert torch.equal(one[0], artwork.draw(understood.scene(0).things[0]))
    assert not torch.equal(one[1], one[0]) and not torch.equal(one[2], one[1])
    assert not any(torch.equal(unseen.image(i), artwork.draw(unseen.scene(i).things[0])) for i in range(0, 192, 16))


@pytest.mark.parametrize(("dataset", "of_each", "fitted"), [(places.DATASET, 4, 1), (varied.DATASET, 10, 4)])
def test_all_images_of_a_pair_show_it_and_are_made_of_the_fitted_pieces(dataset, of_each, fitted):
    """The judge knows every image, and no caption tells which it is."""
    split, pieces = dataset.splits["unlabeled"](1), dataset.splits["pieces"](1)
    assert (len(split), len(pieces)) == (of_each * 192, fitted * 192)
    for pair in range(0, 192, 13):
        images = [split.image(of_each * pair + k) for k in range(of_each)]
        thing = split.scene(of_each * pair).things[0]
        assert [dataset.describe(image) for image in images] == [f"{thing.colour} {thing.kind}"] * of_each
        assert len({image.numpy().tobytes() for image in images}) == of_each
        known = _pieces([pieces.image(fitted * pair + k) for k in range(fitted)])
        assert _pieces(images) == known
    source = open_source(f"{dataset.package}:captioned?seed=1", "t2i")
    assert len(source) == of_each * 120
    assert not {s.things[0] for s in map(source.split.scene, range(len(source)))} & dataset.held_out(1)


def _pieces(images):
    cut = [F.unfold(image[None].float(), 16, stride=16)[0].T for image in images]
    return {tuple(piece) for of_one in cut for piece in of_one.tolist()}


@pytest.mark.parametrize(("dataset", "untold"), [(shared.DATASET, 3), (shared_few.DATASET, 6)])
def test_images_of_shared_codes_have_half_the_pixels(dataset, untold):
    named = 24 * (8 - untold)
    for split, count in (("captioned", named), ("understood", 3 * named), ("unlabeled", 192), ("unseen", 192)):
        source = open_source(f"{dataset.package}:{split}?seed=1", "t2i")
        assert len(source) == count
        for image in (source.split.image(i) for i in range(0, count, 7)):
            assert torch.equal(image, image[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))
    held = dataset.held_out(1)
    assert {kind: sum(t.kind == kind for t in held) for kind in artwork.KINDS} == dict.fromkeys(artwork.KINDS, untold)
    assert {colour: sum(t.colour == colour for t in held) for colour in HUE_NAMES} == dict.fromkeys(
        HUE_NAMES, 3 * untold
    )
    assert not {s.things[0] for name in ("captioned", "understood") for s in _scenes(dataset.splits[name](1))} & held
    asked = [sum(p.pairs == name for p in dataset.prompts(1)) for name in ("", "seen", "held-out")]
    assert asked == [48, named, 2 * 24 * untold]
    unlabeled = dataset.splits["unlabeled"](1)
    assert all(dataset.describe(unlabeled.image(i)) == caption(unlabeled.scene(i))[2:] for i in range(0, 192, 7))


def test_codes_are_shared_by_emoji():
    """Most codes of a held-out pair are in images of seen pairs, and the judge still knows what the codes show."""
    split, held = shared.DATASET.splits["unlabeled"](1), shared.DATASET.held_out(1)
    images = torch.stack([split.image(i) for i in range(len(split))])
    overrides = demo_setup("show_o", shared.DATASET).overrides
    sizes = load_recipe("show_o_emoji_tiny", overrides).model.patches
    codec = PatchCodebook(CodebookSizes(sizes.size, sizes.entries))
    fit_codebook(codec, images)
    codes = codec.encode(images.float() / 127.5 - 1)
    decoded = ((codec.decode(codes) + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    recognised = sum(shared.DATASET.describe(x) == caption(s)[2:] for x, s in zip(decoded, _scenes(split), strict=True))
    assert recognised >= 0.95 * len(split)
    ground, named = codes.flatten().mode().values, [s.things[0] not in held for s in _scenes(split)]
    known = set(codes[torch.tensor(named)].flatten().tolist())
    others = [code for code in codes[~torch.tensor(named)].flatten().tolist() if code != ground]
    assert sum(code in known for code in others) >= 0.8 * len(others)


def _scenes(split):
    return [split.scene(i) for i in range(len(split))]


def test_prompts_are_of_every_kind_and_pair():
    made, held = DATASET.prompts(0), DATASET.held_out(0)
    assert [sum(p.pairs == name for p in made) for name in ("", "seen", "held-out")] == [48, 120, 144]
    assert all((p.scene.things[0] in held) == (p.pairs == "held-out") for p in made if p.pairs)
    assert all(p.text == caption(p.scene) for p in made if p.colours)


def test_the_recipe_knows_every_word():
    assert set(load_recipe("show_o_emoji_tiny").model.words) == set(WORDS)
    written_small = {"USER", "ASSISTANT"}  # in OpenUni's turns
    assert set(load_recipe("open_uni_emoji_tiny").model.words) >= {*WORDS, *FACT_WORDS} - written_small


def test_without_the_artwork_the_package_is_named(monkeypatch):
    monkeypatch.setattr(artwork, "FONT", "openmoji/font/nothing.ttf")
    with pytest.raises(DataError, match=r"OpenMoji artwork, which is not installed: pip install 'reca\[emoji\]'"):
        artwork.font_path()
    with pytest.raises(DataError, match="caption_detail=some of the toy dataset emoji must be one of"):
        open_source("reca.toy_datasets.emoji:unlabeled?caption_detail=some", "t2i")
