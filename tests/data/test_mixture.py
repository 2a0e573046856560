"""Several sources of a task with weights, data.limit and data.shuffle."""

import itertools
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from reca.config.recipe_files import absolute_paths, explain, load_recipe, save_recipe
from reca.data import order
from reca.data.config import DataConfig
from reca.data.loader import open_loader
from reca.data.order import STRETCH, make_order
from reca.data.sources.factory import open_sources
from reca.data.sources.mixture import Mixture
from reca.data.sources.skipped import log_once
from reca.data.views import View, Views
from reca.options.fields import RecipeError
from tests.data.files import fill, image_bytes, tar

VIEWS = Views(gen=View(4), und=None)


@pytest.fixture
def two(tmp_path):
    """A folder of 10 images with red levels from 0, a tar of 30 with red levels from 100."""
    folder = fill(tmp_path / "photos", {f"{n:02}.png": image_bytes((n, 0, 0)) for n in range(10)})
    return folder, tar(tmp_path / "drawn.tar", *((f"{n:02}.png", image_bytes((100 + n, 0, 0))) for n in range(30)))


def mix(two, *weights):
    return [{"source": str(path), "weight": weight} for path, weight in zip(two, weights, strict=True)]


def stream(images, n, rank=0, world_size=1, micro_batch=8, batch_size=8, start=0, **options):
    """The red levels of this rank's first n samples, from an update on."""
    config = DataConfig(images=images, decoder="pillow", **{"workers": 0} | options)
    loader = open_loader(
        config, "reca", VIEWS, seed=3, micro_batch=micro_batch, batch_size=batch_size, rank=rank, world_size=world_size,
        start=start,
    )  # fmt: skip
    reds = (int(view[0, 0, 0]) for batch in loader for view in batch.gen)
    return list(itertools.islice(reds, n))


def test_samples_come_by_weight_and_each_source_has_its_epochs(two):
    source = Mixture([range(10), range(30)], [3.0, 1.0])
    order = make_order(source, seed=1)
    picks = [order.index(p) for p in range(4 * STRETCH)]
    small = [p for p in picks if p < 10]
    assert len(small) == 3 * STRETCH
    for epoch in range(3):
        assert sorted(small[10 * epoch : 10 * epoch + 10]) == list(range(10))
    large = [p for p in picks if p >= 10]
    assert sorted(large[:30]) == sorted(large[30:60]) == list(range(10, 40)) and large[:30] != large[30:60]
    assert 60 < sum(p < 10 for p in picks[:100]) < 90  # drawn, and not one source behind the other
    chosen = [p < 10 for p in picks]
    assert chosen[:STRETCH] != chosen[STRETCH : 2 * STRETCH]
    alike = make_order(Mixture([range(30), range(30)], [1.0, 1.0]), seed=1).orders
    assert [alike[0].index(p) for p in range(30)] != [alike[1].index(p) for p in range(30)]


@pytest.mark.parametrize("weights", [(1, 1), (1, 2), (0.1, 0.3, 0.7), (1e-3, 1)])
def test_shares_are_exact_in_the_long_run(weights):
    order = make_order(Mixture([range(7)] * len(weights), weights), seed=0)
    for n in (1, 3, 10):
        counts = Counter(order.place(p)[0] for p in range(n * STRETCH))
        for number, weight in enumerate(weights):
            assert abs(counts[number] - n * STRETCH * weight / sum(weights)) < 2
        places = [order.place(p) for p in range(n * STRETCH)]
        for number in range(len(weights)):
            assert [place for source, place in places if source == number] == list(range(counts[number]))


def test_ranks_accumulation_and_resuming_change_nothing(two):
    images = mix(two, 3, 1)
    whole = stream(images, 64)
    assert stream(images, 64, micro_batch=2) == whole
    assert stream(images, 32, start=32) == whole[32:]
    halves = [stream(images, 32, rank=rank, world_size=2, micro_batch=4) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    assert [sorted(halves[0][i : i + 4] + halves[1][i : i + 4]) for i in range(0, 32, 4)] == [
        sorted(whole[i : i + 8]) for i in range(0, 64, 8)
    ]
    assert stream(images, 64, workers=3) == whole


def test_keys_and_bad_samples_name_the_source(two):
    folder, _ = two
    (folder / "03.png").write_bytes(b"junk")
    config = DataConfig(images=mix(two, 1, 1), decoder="pillow", workers=0, max_bad_fraction=0.5)
    loader = open_loader(config, "reca", VIEWS, seed=3, micro_batch=8)
    list(itertools.islice(loader, 10))
    assert list(loader.bad_samples.bad) == ["0/03.png"]
    assert loader.source.key(10) == "1/drawn.tar/00.png" and loader.source[10].key == "1/drawn.tar/00.png"


def test_the_start_says_what_each_gives(two, caplog):
    log_once.cache_clear()
    caplog.set_level(logging.INFO, "reca")
    open_sources(DataConfig(images=mix(two, 3, 1)), ["reca"])
    assert "data.images: " in caplog.text
    assert "photos has 10 samples and a share of 75.0%" in caplog.text
    assert "drawn.tar has 30 samples and a share of 25.0%" in caplog.text


def test_identity_is_of_all_sources_and_weights(two):
    found = {
        open_sources(DataConfig(images=images), ["reca"])["reca"].identity()
        for images in (mix(two, 3, 1), mix(two, 1, 1), mix(two[::-1], 1, 1), str(two[0]))
    }
    assert len(found) == 4


# ---- limit and shuffle ----


def test_a_limit_is_a_function_of_the_seed(two):
    folder, drawn = two
    config = DataConfig(images=str(drawn), limit=12)
    first, again, other = (open_sources(config, ["reca"], seed)["reca"] for seed in (0, 0, 1))
    keys = [[source.key(i) for i in range(len(source))] for source in (first, again, other)]
    assert keys[0] == keys[1] == sorted(keys[0]) and len(keys[0]) == 12 and keys[0] != keys[2]
    assert first.identity() == again.identity() != other.identity()
    assert first[3].key == keys[0][3] and first.size(3) > 0
    whole = open_sources(DataConfig(images=str(folder), limit=10**6), ["reca"])["reca"]
    assert len(whole) == 10
    reds = stream(str(drawn), 24, limit=12)
    assert sorted(reds[:12]) == sorted(reds[12:]) and len(set(reds)) == 12


def test_a_limit_of_several_sources_is_of_their_shares(two):
    source = open_sources(DataConfig(images=mix(two, 1, 3), limit=8), ["reca"])["reca"]
    assert [len(part) for part in source.parts] == [2, 6]
    source = open_sources(DataConfig(images=mix(two, 1, 99), limit=8), ["reca"])["reca"]
    assert [len(part) for part in source.parts] == [1, 8]  # what is drawn from has a sample


def test_stored_order(two):
    assert stream(str(two[1]), 40, shuffle=False) == [100 + n % 30 for n in range(40)]
    assert stream(str(two[1]), 10, shuffle=False, limit=4) == [100, 101, 102, 103, 100, 101, 102, 103, 100, 101]
    reds = stream(mix(two, 1, 1), 20, shuffle=False)
    assert [red for red in reds if red >= 100] == list(range(100, 100 + sum(red >= 100 for red in reds)))


def test_a_limit_takes_whole_row_groups_of_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    midjourney(tmp_path / "a.parquet", 0, 40)
    source = open_sources(DataConfig(images=str(tmp_path), limit=10), ["reca"])["reca"]
    assert len(source) == 10 == sum(block.samples for block in source.blocks)
    reds = stream(str(tmp_path), 20, limit=10)
    assert sorted(reds[:10]) == sorted(reds[10:]) and len(set(reds)) == 10


def test_every_order_covers_its_blocks(tmp_path):
    from reca.data.order import Block, Windows

    order = Windows([Block(n, 2**26) for n in (3, 1, 7, 2)], seed=5)
    for epoch in range(3):
        assert sorted(order.index(13 * epoch + p) for p in range(13)) == list(range(13))
    others = np.array([[order.substitute(p, attempt) for p in range(13)] for attempt in range(1, 8)])
    assert others.min() >= 0 and others.max() <= 12 and len({tuple(row) for row in others}) == 7
    single = Windows([Block(20, 2**26)], seed=5)
    epochs = [[single.index(20 * epoch + p) for p in range(20)] for epoch in range(2)]
    assert epochs[0] != epochs[1]  # one row group is shuffled anew, too


def test_a_global_order_holds_this_epoch_and_the_next(monkeypatch):
    """At 4 bytes per sample each. A substitute takes none: its own permutation held as much, and stalled the loader."""
    made, make = [], order._permutation
    monkeypatch.setattr(order, "_permutation", lambda *given: made.append(make(*given)) or made[-1])
    shuffled = order.Shuffled(8, seed=3)
    places = [3, 9, 7, 10, 0, 15]
    assert [shuffled.index(p) for p in places] == [4, 3, 2, 6, 6, 1]  # as runs that are resumed had them
    assert [one.dtype for one in made] == [np.int32] * 2
    others = np.array([[shuffled.substitute(p, attempt) for p in range(800)] for attempt in range(1, 6)])
    assert len(made) == 2 and np.bincount(others.ravel(), minlength=8).min() > 400  # of 500 on average
    assert len({tuple(row) for row in others}) == 5


def test_more_samples_than_int32_can_number(monkeypatch):
    """torch.randperm does not refuse them, and such an order takes gigabytes, so only its type is looked at."""
    given = []
    monkeypatch.setattr(torch, "randperm", lambda size, generator, dtype: given.append(dtype) or torch.arange(1))
    for size in (2**31 - 1, 2**31 + 2):
        order.Shuffled(size, seed=0).index(0)
    assert given == [torch.int32, torch.int64]


# ---- recipes ----


@pytest.mark.parametrize(
    "text", ["a-{000..009}.tar", "{000..009}.tar", "*.tar", "a: b", "a #b", "/a b/[x]", "s3://a/b", "&a", "it's"]
)
def test_texts_in_a_list_of_sources_are_taken_as_they_are(text):
    def sources(overrides):
        return [item["source"] for item in load_recipe("show_o_tiny", overrides).data.images]

    assert sources([f"data.images=[a.tar, {text}]"]) == sources({"data.images": ["a.tar", text]}) == ["a.tar", text]
    assert sources({"data.images": [text, "a, b", "[ab]"]}) == [text, "a, b", "[ab]"]
    assert sources({"data.images": [text, {"source": text, "weight": 2}]}) == [text, text]


def test_lists_in_recipes(two, tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(
        "umm: show_o\ndata:\n  images:\n    - {source: a.tar, weight: 3}\n    - 'b, {c}.tar'\n    - source: hf:x/y\n"
    )
    expected = [
        {"source": "a.tar", "weight": 3.0},
        {"source": "b, {c}.tar", "weight": 1.0},
        {"source": "hf:x/y", "weight": 1.0},
    ]
    recipe = load_recipe(path)
    assert recipe.data.images == expected
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").data.images == expected
    shown = next(line for line in explain(recipe).splitlines() if line.startswith("data.images="))
    override = shown[: shown.index("]") + 1]
    assert load_recipe("show_o_512", [override]).data.images == expected
    assert load_recipe("show_o_512", {"data.images": expected}).data.images == expected
    monkeypatch.chdir(tmp_path)
    there = [item["source"] for item in absolute_paths(recipe).data.images]
    assert there == [str(tmp_path / "a.tar"), str(tmp_path / "b, {c}.tar"), "hf:x/y"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "at least one"),
        ("[{weight: 1}]", r"\{source: TEXT, weight: NUMBER\}"),
        ("[{source: a, wieght: 1}]", r"data.images\[0\] .* 'source, wieght': .*\{source: TEXT, weight: NUMBER\}"),
        ("[{source: a, weight: 0}]", r"data.images\[0\].weight=0 in the overrides must be above 0"),
        ("{source: a}", "expected a text or a list of at least one"),
        ("{source:a}", "expected a text or a list of at least one"),
        ("[{source: a, weight: many}]", r"data.images\[0\].weight='many'.*expected a number"),
        ("[{source: ''}]", "is empty"),
        ("[a, [b]]", "data.images"),
    ],
)
def test_lists_that_are_wrong(text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("show_o_512", [f"data.images={text}"])


def test_every_source_of_a_mixture_keeps_its_order(monkeypatch):
    """Twelve permutations are made once each, not anew for every sample that another source stands before."""
    made = []
    real = order._permutation
    monkeypatch.setattr(order, "_permutation", lambda rng, size: made.append(size) or real(rng, size))
    mixed = order.Mixed([order.Shuffled(100, seed) for seed in range(12)], [100] * 12, [1.0] * 12, 0)
    for position in range(600):
        mixed.index(position)
    assert made.count(100) == 12
