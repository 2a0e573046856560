"""Sources, order, substitution of bad files, and batches that do not depend on how they are split."""

import io
import itertools
import json
import tarfile
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch

from reca.data import order
from reca.data.config import DataConfig
from reca.data.errors import DataError
from reca.data.loader import open_loader
from reca.data.order import Block, Shuffled, Windows
from reca.data.sample import Sample
from reca.data.sources.factory import open_source
from reca.data.views import View, Views
from reca.rng import CounterRNG
from tests.data.files import image_bytes

VIEWS = Views(gen=View(4), und=None)


def png(value):
    return image_bytes((value % 256, value // 256, 0))


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        (tmp_path / "deep" if i % 2 else tmp_path).mkdir(exist_ok=True)
        (tmp_path / ("deep" if i % 2 else ".") / f"{i:02d}.png").write_bytes(png(i))
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def loader(images, task="reca", micro_batch=4, start=0, rank=0, world_size=1, seed=0, bad_samples=None, **config):
    spec = {"reca": "images", "t2i": "captions", "i2t": "conversations"}[task]
    data = DataConfig(**{spec: str(images), "workers": 0, "max_bad_fraction": 0.3} | config)
    return open_loader(
        data,
        task,
        VIEWS,
        seed=seed,
        micro_batch=micro_batch,
        start=start,
        rank=rank,
        world_size=world_size,
        bad_samples=bad_samples,
        identity="a model",
    )


def values(batches):
    return [int(view[0, 0, 0]) for batch in batches for view in batch.gen]


def take(loader, n):
    return list(itertools.islice(iter(loader), n))


def test_an_epoch_is_every_sample_once_and_epochs_differ():
    for size in (1, 7, 100):
        epochs = [[Shuffled(size, 3).index(e * size + i) for i in range(size)] for e in range(3)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert size < 7 or epochs[0] != epochs[1]


def test_folder_is_read_whole(folder):
    assert sorted(values(take(loader(folder), 5))) == list(range(20))


@pytest.mark.parametrize(("prefetch", "ahead"), [(2, 10), (7, 14), (0, 0)])
def test_the_next_step_is_read_while_one_computes(folder, prefetch, ahead):
    """A step takes all of its passes at once: what is not read by then, it waits for."""
    data = DataConfig(images=str(folder), workers=2, prefetch=prefetch)
    made = open_loader(data, "reca", VIEWS, seed=0, micro_batch=2, batch_size=10)
    read, inner = [], made._read
    made._read = lambda position: (read.append(position), inner(position))[1]
    stream = iter(made)
    for _ in range(2):
        for _ in range(5):
            next(stream)
    made.pool.shutdown()  # what was asked for is finished
    assert sorted(read) == list(range(20 + ahead))


@pytest.mark.parametrize("workers", [0, 3])
def test_any_split_sees_the_same_samples(folder, workers):
    one = take(loader(folder, micro_batch=2, workers=workers), 8)
    ids = torch.cat([b.sample_ids for b in one]).tolist()
    assert ids == list(range(16))
    ranks = [take(loader(folder, micro_batch=2, rank=r, world_size=4, workers=workers), 2) for r in range(4)]
    merged = [ranks[r][m] for m in range(2) for r in range(4)]
    assert values(one) == values(merged) and [b.text for b in one] == [b.text for b in merged]


def test_resuming_continues_exactly(folder):
    whole, rest = take(loader(folder), 10), take(loader(folder, start=24), 4)
    assert values(whole)[24:] == values(rest) and [b.text for b in whole[6:]] == [b.text for b in rest]


def test_templates_are_drawn_by_sample_and_vary(folder):
    texts = [t for b in take(loader(folder, micro_batch=50), 2) for t in b.text]
    assert len(set(texts)) > 60


def spoil(folder, names):
    for name in names:
        (folder / name).write_bytes(b"<html>not found</html>")


def test_bad_files_are_skipped_counted_and_listed(folder, tmp_path):
    spoil(folder, ["02.png", "deep/05.png"])
    bad_samples = tmp_path / "bad.jsonl"
    stream = loader(folder, bad_samples=bad_samples)
    seen = Counter(values(take(stream, 5)))
    assert set(range(20)) - {2, 5} == set(seen) and sum(seen.values()) == 20  # all others once, two of them again
    assert stream.bad == 2
    lines = [json.loads(line) for line in bad_samples.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["02.png", "deep/05.png"]
    assert all("the file is a web page" in line["reason"] and line["bytes"] == 22 for line in lines)


def test_substitutes_do_not_depend_on_the_split(folder):
    spoil(folder, ["02.png", "deep/05.png"])
    assert values(take(loader(folder), 10))[24:] == values(take(loader(folder, start=24), 4))


def test_too_many_bad_files_stop_the_run(folder):
    spoil(folder, [f"{i:02d}.png" for i in range(0, 16, 2)])
    with pytest.raises(DataError, match="max_bad_fraction=0.3.*html|max_bad_fraction=0.3"):
        take(loader(folder), 5)


def test_nothing_readable_is_one_clear_error(folder):
    spoil(folder, [str(p.relative_to(folder)) for p in folder.rglob("*.png")])
    with pytest.raises(DataError, match="unreadable"):
        take(loader(folder), 1)


def test_missing_empty_and_imageless_folders(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        loader(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        loader(tmp_path / "empty")
    with pytest.raises(DataError, match="data.images is null"):
        open_loader(DataConfig(), "reca", VIEWS, seed=0, micro_batch=1)


def test_captions_stand_beside_images(folder):
    with pytest.raises(DataError, match="have no caption"):
        loader(folder, "t2i")
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"image {int(path.stem)}\n")
    batch = take(loader(folder, "t2i"), 1)[0]
    assert batch.text == [f"image {v}" for v in values([batch])]


def make_tar(path, first, count, captions=True):
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + count):
            for suffix, data in (("png", png(i)), ("txt", f"image {i}".encode())):
                if suffix == "txt" and not captions:
                    continue
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_tars_by_glob_and_range(tmp_path):
    make_tar(tmp_path / "a-000.tar", 0, 6)
    make_tar(tmp_path / "a-001.tar", 6, 6)
    for spec in (tmp_path / "a-*.tar", tmp_path / "a-{000..001}.tar"):
        batches = take(loader(spec, "t2i"), 3)
        assert sorted(values(batches)) == list(range(12))
        assert [t for b in batches for t in b.text] == [f"image {v}" for v in values(batches)]


def test_broken_tars(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing" * 100)
    with pytest.raises(DataError, match="not an uncompressed tar"):
        loader(tmp_path / "x.tar")
    with pytest.raises(DataError, match="no tar file matches"):
        loader(tmp_path / "y-*.tar")
    make_tar(tmp_path / "z.tar", 0, 2, captions=False)
    with pytest.raises(DataError, match="has no .txt caption"):
        loader(tmp_path / "z.tar", "t2i")


def test_conversations_that_are_none(folder, tmp_path):
    item = {"image": "00.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([item]))
    with pytest.raises(DataError, match="data.image_root .*nowhere is not a folder"):
        open_source(str(path), "i2t", str(tmp_path / "nowhere"))
    for content, words in ((b"\xff\xd8", "is not JSON"), (b"{}", "not LLaVA-style"), (b'["a"]', "not LLaVA-style")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            open_source(str(path), "i2t", str(folder))
    words = "talk.json is not images; conversations are data.conversations .*--task i2t.*name a"
    with pytest.raises(DataError, match=words):
        open_source(str(path), "reca")


def test_conversations(folder):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A square."), ("human", "Which colour?"), ("gpt", "Red.")]
    item = {"image": "00.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (folder / "talk.json").write_text(
        json.dumps([item, {"conversations": []}, {"image": "gone.png", **{"conversations": item["conversations"]}}])
    )
    source = open_source(str(folder / "talk.json"), "i2t")
    assert len(source) == 2 and source[0].text == [("What is it?", "A square."), ("Which colour?", "Red.")]
    stream = loader(folder / "talk.json", "i2t", max_bad_fraction=0.6)
    assert values(take(stream, 2)) == [0] * 8 and stream.bad == 1
    (folder / "broken.json").write_text("[{")
    with pytest.raises(DataError, match="is not JSON"):
        open_source(str(folder / "broken.json"), "i2t")
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(folder / "none.json"), "i2t")


def test_dali_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr("reca.data.dali.available", lambda: False)
    with pytest.raises(DataError, match="DALI is not installed"):
        loader(folder, decoder="dali")


# ---- the feature cache ----


def features(batch):
    """What an encoder might make of a batch: one tensor, one list of tensors that differ in shape."""
    pixels = torch.stack(batch.gen).float()
    return {"mean": pixels.mean((1, 2, 3)), "parts": [p[:, : 1 + i % 2] for i, p in enumerate(pixels)]}


def encode(stream, count):
    """Take batches that have no features yet, and cache those of an encoder."""
    batches = take(stream, count)
    for batch in batches:
        assert batch.features is None
        batch.on_encoded(features(batch))
    stream.close()  # waits until they are written
    return batches


def test_cache_brings_features_back_and_nothing_is_decoded(folder, tmp_path, monkeypatch):
    cached = {"images": folder, "cache": str(tmp_path / "features")}
    first = encode(loader(**cached), 5)
    again = loader(**cached)
    monkeypatch.setattr(again, "decode", None)
    for old, new in zip(first, take(again, 5), strict=True):
        assert new.gen is None and new.text == old.text and torch.equal(new.sample_ids, old.sample_ids)
        assert torch.equal(new.features["mean"], features(old)["mean"])
        assert all(torch.equal(a, b) for a, b in zip(new.features["parts"], features(old)["parts"], strict=True))


def test_a_batch_that_is_new_in_part_is_decoded_whole(folder, tmp_path):
    cached = {"images": folder, "cache": str(tmp_path / "features")}
    encode(loader(**cached), 1)
    (wider,) = take(loader(**cached, micro_batch=6), 1)
    assert wider.features is None and values([wider]) == values(take(loader(folder, micro_batch=6), 1))


def test_a_torn_cache_file_is_made_again(folder, tmp_path):
    cached = {"images": folder, "cache": str(tmp_path / "features")}
    (batch,) = encode(loader(**cached), 1)
    torn = next((tmp_path / "features").rglob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:20])
    (again,) = take(loader(**cached), 1)
    assert again.features is None and values([again]) == values([batch])


def test_caches_of_other_models_views_and_versions_are_not_read(folder, tmp_path, monkeypatch):
    data = DataConfig(images=str(folder), workers=0, cache=str(tmp_path / "features"))

    def opened(identity, views=VIEWS):
        return open_loader(data, "reca", views, seed=0, micro_batch=4, identity=identity)

    encode(opened({"weights": "a"}), 1)
    assert take(opened({"weights": "a"}), 1)[0].features and take(opened({"weights": "b"}), 1)[0].features is None
    assert take(opened({"weights": "a"}, replace(VIEWS, und=View(8, blur=2))), 1)[0].features is None
    assert opened(None).cache is None
    monkeypatch.setattr("reca.data.cache.VERSION", 0)
    assert take(opened({"weights": "a"}), 1)[0].features is None


def test_random_crops_cannot_be_cached(folder, tmp_path):
    data = DataConfig(images=str(folder), cache=str(tmp_path))
    with pytest.raises(DataError, match=r"is a random crop.*data\.cache=null"):
        open_loader(data, "reca", Views(gen=View(4, "random_crop"), und=None), seed=0, micro_batch=4, identity="")


@pytest.mark.parametrize("made", [lambda: Shuffled(100, 0), lambda: Windows([Block(10, 2**30)] * 10, 0)])
def test_threads_share_the_order_of_an_epoch(made, monkeypatch):
    """Of a hundred million samples it takes seconds and 400 MB, which every thread of every rank would take at once."""
    real, epochs, all_ask = order._permutation, Counter(), threading.Event()

    def permutation(rng, size):
        epochs[rng.seed] += 1
        all_ask.wait(10)
        return real(rng, size)

    def ask(place):
        if next(asked) == 3:
            all_ask.set()
        found[place] = shared.index(place)

    asked, found, shared = itertools.count(), {}, made()
    with monkeypatch.context() as patch:
        patch.setattr(order, "_permutation", permutation)
        threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    alone = made()
    assert found == {place: alone.index(place) for place in range(4)}
    assert epochs[CounterRNG(0, 0).seed] == 1


@pytest.mark.parametrize(
    "item", ["image", ("a", b"", None), Sample("a", "no bytes", None)], ids=["text", "tuple", "image"]
)
def test_a_source_that_returns_no_sample(item):
    """A PIL image failed as an object without `text`."""

    class Source(list):
        def key(self, index):
            return "a"

    made = open_loader(DataConfig(), "reca", VIEWS, seed=0, micro_batch=1, source=Source([item]))
    with pytest.raises(
        DataError, match=r"a source returns reca.data.sample.Sample\(key, image, text\).*; got .*(str|tuple)"
    ):
        made.row_of(0)
    made.close()
