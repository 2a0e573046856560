"""Bad samples are counted over ranks and starts, written once, and whoever meets another exception names the sample."""

import itertools
import json
import logging
import multiprocessing
import os

import numpy as np
import pytest
import torch

from reca.data.audit import audit, report
from reca.data.bad_samples import BadSamples
from reca.data.config import DataConfig
from reca.data.errors import BadSample, DataError
from reca.data.loader import open_loader
from reca.data.pixels import BadImage
from reca.data.sources.factory import open_source
from reca.data.sources.mixture import Mixture, Subset
from reca.data.sources.tars import Tars
from reca.data.views import View, Views
from tests.data.files import conversations, fill, image_bytes, row, tar

VIEWS = Views(gen=View(4), und=None)


def loader(root, task="reca", micro_batch=2, **options):
    config = {"workers": 0, "max_bad_fraction": 0.5, "decoder": "pillow"} | options.pop("config", {})
    spec = {"reca": "images", "t2i": "captions"}[task]
    data = DataConfig(**{spec: str(root)} | config)
    return open_loader(data, task, VIEWS, seed=0, micro_batch=micro_batch, identity=[], **options)


def take(stream, n):
    return list(itertools.islice(iter(stream), n))


def keys(path):
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


@pytest.fixture
def root(tmp_path):
    """Eight images, of which two are none."""
    files = {f"{i}.png": image_bytes((i, 0, 0)) for i in range(6)} | {"bad0.png": b"junk", "bad1.png": b"x"}
    return fill(tmp_path / "photos", files)


def read_as(rank, root, path, start):
    torch.set_num_threads(1)  # a forked process lacks the other threads of OpenMP, and would wait for them
    start.wait()
    stream = loader(root, rank=rank, world_size=4, micro_batch=2, bad_samples=path)
    take(stream, 8)
    start.wait(60)  # not every rank meets both
    os._exit(0 if stream.bad == 2 else 1)


def test_four_ranks_write_each_bad_file_once(root, tmp_path):
    context = multiprocessing.get_context("fork")
    path, start = tmp_path / "bad.jsonl", context.Barrier(4)
    ranks = [context.Process(target=read_as, args=(rank, root, path, start)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert sorted(keys(path)) == ["bad0.png", "bad1.png"]


def test_the_share_counts_all_ranks(root, tmp_path):
    path = tmp_path / "bad.jsonl"
    source = open_source(str(root), "reca")
    one, two = (BadSamples(path, source, max_fraction=0.2) for _ in range(2))
    one.add(6, "junk")
    assert (one.count(), two.count()) == (1, 1)
    with pytest.raises(DataError, match=r"2 of 8 samples are unreadable.*bad0.png \(junk\); bad1.png \(x\)"):
        two.add(7, "x")
    with pytest.raises(DataError, match="2 of 8 samples"):  # a start that finds the same ones ends as the one before it
        BadSamples(path, source, max_fraction=0.2).add(7, "x")
    BadSamples(path, source, max_fraction=0.3).add(7, "x")
    assert keys(path) == ["bad0.png", "bad1.png"]


def test_the_share_is_not_exceeded_where_it_is_reached(tmp_path):
    """0.29 * 100 is a little less than 29 in floating point."""
    source = open_source(str(fill(tmp_path, {f"{i}.png": b"" for i in range(100)})), "reca")
    for share in range(100):
        bad_samples = BadSamples(None, source, share / 100)
        for index in range(share):
            bad_samples.add(index, "junk")
        with pytest.raises(DataError, match=f"{share + 1} of 100 samples"):
            bad_samples.add(share, "junk")


def test_the_share_is_of_images_and_not_of_rows_about_them(tmp_path):
    rows = [row("human", str(i), "gpt", "A", image=name) for i in range(50) for name in ("a.png", "b.png")]
    bad_samples = BadSamples(None, open_source(str(conversations(tmp_path, *rows)), "i2t"), 0.4)
    with pytest.raises(DataError, match="1 of 2 samples"):
        bad_samples.add(1, "junk")


def test_samples_with_keys_of_their_own_are_not_counted_one_by_one(tmp_path, monkeypatch):
    """That would read every entry of the index during the run. The images of a subset of rows are still counted."""
    first, second = (tar(tmp_path / f"{n}.tar", *((f"{i}.png", b"") for i in range(20))) for n in range(2))
    talk = conversations(tmp_path, *(row("human", str(i), "gpt", "A", image="a.png") for i in range(10)))
    single, rows = open_source(str(first), "reca"), open_source(str(talk), "i2t")
    some = np.arange(5)
    mixed = Mixture([Subset(single, some), open_source(str(second), "reca")], [1, 1])
    for source, images in ((single, 20), (Subset(single, some), 5), (mixed, 25), (Subset(mixed, some), 5)):
        with pytest.raises(DataError, match=f"1 of {images} samples"):
            BadSamples(None, source, 0.01).add(0, "junk")
    for source in (Subset(rows, some), Mixture([Subset(rows, some)], [1])):
        with pytest.raises(DataError, match="1 of 1 samples"):
            BadSamples(None, source, 0.5).add(0, "junk")
    monkeypatch.setattr(Tars, "key", lambda *_: "0.tar/0.png")
    with pytest.raises(DataError, match="1 of 25 samples"):
        BadSamples(None, mixed, 0.01).add(0, "junk")


def test_starts_write_each_bad_file_once(root, tmp_path):
    path = tmp_path / "bad.jsonl"
    for start in range(3):
        stream = loader(root, bad_samples=path, start=start)
        take(stream, 8)
        assert stream.bad == 2
    assert sorted(keys(path)) == ["bad0.png", "bad1.png"]
    assert [json.loads(line)["bytes"] for line in sorted(path.read_text().splitlines())] == [4, 1]


def test_repaired_and_removed_files_count_no_longer(root, tmp_path):
    path = tmp_path / "bad.jsonl"
    take(loader(root, bad_samples=path), 8)
    (root / "bad0.png").write_bytes(image_bytes())
    assert loader(root, bad_samples=path).bad == 1
    (root / "bad1.png").unlink()
    assert loader(root, bad_samples=path).bad == 0
    (root / "bad0.png").write_bytes(b"other junk")
    stream = loader(root, bad_samples=path)
    take(stream, 8)
    assert stream.bad == 1 and keys(path).count("bad0.png") == 2  # another file than the one of the first line


def test_a_file_that_was_away_counts_no_longer_when_it_is_back(root, tmp_path):
    source = open_source(str(root), "reca")
    one, other = (BadSamples(tmp_path / "bad.jsonl", source, 0.5) for _ in range(2))
    one.add(0, "OSError: the disk is away")
    assert other.count() == 1
    one.mark_good(0)
    later = BadSamples(tmp_path / "bad.jsonl", source, 0.5)
    assert one.count() == other.count() == later.count() == 0  # for other ranks and starts as well
    later.add(0, "OSError: the disk is away")
    assert one.count() == other.count() == later.count() == 1


def test_torn_lines_and_lines_of_other_data_do_not_matter(root, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"key": "other.png", "sample": 99, "bytes": 1, "reason": ""}\n[]\nnull\n{"key": "bad0')
    stream = loader(root, bad_samples=path)
    take(stream, 8)
    assert stream.bad == 2
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[4:]] in (
        ["bad0.png", "bad1.png"],
        ["bad1.png", "bad0.png"],
    )


def test_a_name_with_a_line_break_is_printed_on_one_line(tmp_path, caplog):
    root = fill(tmp_path / "photos", {"a\nb.png": b"junk", "c.png": image_bytes(), ".d\ne.png": b""})
    source = open_source(str(root), "reca")
    bad_samples = BadSamples(None, source, 0.5)
    bad_samples.add(0, "no\nimage")
    text = report(audit(source), source.skipped)
    messages = [record.getMessage() for record in caplog.records]
    assert not any("\n" in message for message in messages) and r"a\nb.png is skipped: no\nimage" in messages[-1]
    assert any(r".d\ne.png" in message for message in messages)
    assert r"  a\nb.png: not an image" in text and r".d\ne.png" in text
    with pytest.raises(DataError) as error:
        BadSamples(None, source, 0.1).add(0, "x")
    assert "\n" not in str(error.value) and list(bad_samples.bad) == ["a\nb.png"]


def test_a_list_of_bad_samples_that_cannot_be_written_still_counts(root, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    stream = loader(root, bad_samples=tmp_path / "file" / "bad.jsonl")
    take(stream, 8)
    assert stream.bad == 2 and "cannot be written" in caplog.text


def test_the_first_bad_sample_is_said(root, tmp_path, caplog):
    take(loader(root, bad_samples=tmp_path / "bad.jsonl"), 8)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "is skipped: not an image in a supported format" in warnings[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_that_are_none_are_bad_samples(tmp_path, workers):
    files = {f"{i}.png": image_bytes() for i in range(4)} | {
        "0.txt": b"a",
        "1.txt": b"",
        "2.txt": b"\x92",
        "3.txt": b"b",
    }
    stream = loader(fill(tmp_path, files), "t2i", config={"workers": workers})
    assert {text for batch in take(stream, 8) for text in batch.text} == {"a", "b"}
    assert {key: reason[:22] for key, reason in stream.bad_samples.bad.items()} == {
        "1.png": "the caption is empty",
        "2.png": "caption: the text is n",
    }
    stream.close()


def test_a_table_is_not_damaged_if_the_machine_cannot_open_it(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    source = open_source(str(midjourney(tmp_path / "a.parquet", 0, 1)), "reca")

    def fail(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", fail)
    with pytest.raises(OSError, match="Too many open files"):
        source[0]


def test_nor_is_its_footer(tmp_path, monkeypatch):
    """It is read again with the first row of each file."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    stream = loader(midjourney(tmp_path / "a.parquet", 0, 8))

    def fail(path, *arguments):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(type(tmp_path), "open", fail)
    with pytest.raises(DataError, match=r"sample a.parquet:\d \(data.images\): OSError: .*Too many open files"):
        take(stream, 1)
    assert not stream.bad


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError("strange"), MemoryError(), OSError(24, "Too many open files")])
def test_any_other_exception_names_the_sample(root, workers, error, monkeypatch):
    def fail(*_):
        raise error

    stream = loader(root, config={"workers": workers})
    monkeypatch.setattr(stream, "decode", fail)
    with pytest.raises(DataError, match=rf"sample \w+\.png \(data.images\): {type(error).__name__}") as raised:
        take(stream, 1)
    assert raised.value.__cause__ is error
    stream.close()


def test_files_that_vanish_are_bad_samples(root):
    stream = loader(root)
    (root / "0.png").unlink()
    take(stream, 8)
    assert "FileNotFoundError" in stream.bad_samples.bad["0.png"] and stream.bad == 3


def test_reads_of_a_batch_end_with_its_first_error(root, monkeypatch):
    """Those that wait would each try a sample, and where storage is slow repeat their requests."""
    reads, stream = [], loader(root, micro_batch=8, config={"workers": 1, "max_bad_fraction": 0.0, "prefetch": 0})

    def fail(_, index):
        reads.append(index)
        raise OSError("the disk is away")

    monkeypatch.setattr(type(stream.source), "__getitem__", fail)
    with pytest.raises(DataError, match="1 of 8 samples are unreadable"):
        take(stream, 1)
    assert len(reads) == 1
    stream.close()


def test_the_last_attempt_may_fail_in_a_batch(tmp_path, monkeypatch):
    class Bad:
        def takes(self, image):
            return True

        def batch(self, images, positions):
            return [BadSample("is damaged") for _ in images]

    stream = loader(fill(tmp_path, {"a.png": image_bytes()}), config={"max_bad_fraction": 1.0})
    stream.batched = Bad()
    monkeypatch.setattr("reca.data.loader.ATTEMPTS", 1)
    with pytest.raises(DataError, match="1 samples in a row cannot be used, the last is a.png"):
        take(stream, 1)


def test_nothing_readable_names_the_last_sample(tmp_path):
    stream = loader(fill(tmp_path, {"a.png": b""}), config={"max_bad_fraction": 1.0})
    with pytest.raises(DataError, match="100 samples in a row cannot be used, the last is a.png"):
        take(stream, 1)


# ---- the feature cache ----


def cached(spec, folder):
    """Mean level of each of 4 samples, through the cache."""
    stream, means = loader(spec, micro_batch=1, config={"cache": str(folder), "images": str(spec)}), []
    for batch in take(stream, 4):
        features = batch.features or {"mean": batch.gen[0].float().mean()[None]}
        if batch.features is None:
            batch.on_encoded(features)
        means.append(round(float(features["mean"][0])))
    stream.close()
    return means


def test_features_belong_to_the_content(tmp_path, monkeypatch):
    root, cache = (
        fill(tmp_path / "here", {"a/x.png": image_bytes((3, 3, 3)), "b/x.png": image_bytes((9, 9, 9))}),
        tmp_path / "c",
    )
    assert sorted(cached(root, cache)) == [3, 3, 9, 9]
    stamp = os.stat(root / "a/x.png")
    (root / "a/x.png").write_bytes(image_bytes((5, 5, 5)))  # of the same size, and made to look as old
    os.utime(root / "a/x.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert sorted(cached(root, cache)) == [5, 5, 9, 9]
    root.rename(tmp_path / "there")
    monkeypatch.setattr("reca.data.transforms.open_rgb", None)  # nothing is decoded
    assert sorted(cached(tmp_path / "there", cache)) == [5, 5, 9, 9]


def test_names_that_are_no_text_are_cached(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / os.fsdecode(b"caf\xe9.png")).write_bytes(image_bytes((7, 7, 7)))
    assert cached(tmp_path / "photos", tmp_path / "c") == [7] * 4


def test_a_full_disk_ends_the_cache_and_not_the_run(root, tmp_path, monkeypatch, caplog):
    fill(root, {"bad0.png": image_bytes(), "bad1.png": image_bytes((1, 1, 1))})

    def full(path, data):
        path.open("wb").write(data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    stream = loader(root, config={"cache": str(tmp_path / "c")})
    for batch in take(stream, 4):
        batch.on_encoded({"mean": batch.gen[0].float().mean()[None].expand(2)})
    stream.close()
    warnings = [record.getMessage() for record in caplog.records if "data.cache" in record.getMessage()]
    assert len(warnings) == 1 and "No space left on device" in warnings[0] and "iB free" in warnings[0]
    assert str(tmp_path / "c") in warnings[0] and not [p for p in (tmp_path / "c").rglob("*") if p.is_file()]


def test_a_cached_image_in_a_batch_that_is_new_in_part_may_be_bad_by_now(root, tmp_path, monkeypatch):
    """Its position is filled by a substitute, as any other's."""
    fill(root, {"bad0.png": image_bytes(), "bad1.png": image_bytes((1, 1, 1))})
    cache = {"cache": str(tmp_path / "c")}
    earlier = loader(root, micro_batch=1, config=cache)
    (first,) = take(earlier, 1)
    first.on_encoded({"mean": first.gen[0].float().mean()[None]})
    earlier.close()
    stream = loader(root, config=cache)
    bad, decode = stream._read(0).sample, stream.decode

    def refuse(data, position):
        if data == bad.image:
            raise BadImage("junk")
        return decode(data, position)

    monkeypatch.setattr(stream, "decode", refuse)
    (batch,) = take(stream, 1)
    assert len(batch.gen) == 2 and stream.bad == 1
