"""DALI's decoder beside Pillow's: the same views, whole batches, and what a bad file costs. See fake_dali."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from reca.data import dali
from reca.data.batch import Batch
from reca.data.config import DataConfig
from reca.data.loader import open_loader
from reca.data.pixels import BadImage
from reca.data.transforms import PillowDecoder
from reca.data.views import View, Views
from reca.rng import CounterRNG
from tests.data import fake_dali
from tests.data.files import encoded


@pytest.fixture(params=["fake", "real"])
def library(request, monkeypatch):
    """The calls of the decoder; None: DALI itself is used."""
    if request.param == "fake":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return fake_dali.install(monkeypatch)
    if not dali.available():
        pytest.skip("DALI is not installed (pip install 'reca[dali]')")
    return None


def photo(number, size=(90, 60)):
    """Smooth colours with sharp edges in them."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 2 + number * 9, y * 3 + 40, (x // 7 + y // 5) % 2 * 200], -1).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def jpeg(number, **options):
    return encoded(photo(number, (90 + 3 * number, 60)), "JPEG", quality=90, **options)


def broken(file):
    """Whole by its header and its end, without any pixels."""
    return file[: file.index(b"\xff\xda")] + b"\xff\xd9"


def rotated(number):
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(number, exif=exif)


FITS = ["squash", "stretch", "center_crop", "clip_crop", "random_crop", "pad", "letterbox", "bound"]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("blur", [1, 4])
def test_a_batch_has_pillows_views(library, fit, blur):
    views = Views(gen=View(48, fit, min_size=16, stride=16), und=View(28, fit, "bilinear", blur=blur))
    decoder, pillow = dali.DaliDecoder(views, CounterRNG(0), device="cpu"), PillowDecoder(views, CounterRNG(0))
    files = [jpeg(i) for i in range(5)]
    for number, found in enumerate(decoder.batch(files, range(5))):
        for got, want in zip(found, pillow(files[number], number), strict=True):
            assert torch.equal(got, want) and got.is_contiguous()
    assert library is None or library == [5]


def test_a_view_that_is_not_wanted(library):
    decoder = dali.DaliDecoder(Views(None, View(8)), CounterRNG(0), device="cpu")
    assert [(gen, und.shape) for gen, und in decoder.batch([jpeg(0)], [0])] == [(None, (3, 8, 8))]
    assert decoder.batch([], []) == []


def test_a_bad_file_costs_itself_only(library, caplog):
    """Halves are decoded again: 2 log2 of the batch calls more, and twice its files at most."""
    views = Views(View(16), None)
    files = [jpeg(i) for i in range(16)]
    files[5] = broken(files[5])
    decoder = dali.DaliDecoder(views, CounterRNG(0), device="cpu")
    with caplog.at_level(logging.WARNING):
        found = decoder.batch(files, range(16))
    assert isinstance(found[5], BadImage)
    assert all(torch.equal(found[i][0], decoder.pillow(files[i], i)[0]) for i in range(16) if i != 5)
    assert len(caplog.records) == 1 and "Pillow decodes the files that DALI cannot; the first error: " in caplog.text
    assert library is None or library == [16, 8, 4, 4, 2, 1, 1, 2, 8]
    assert [decoder.takes(file) for file in files] == [n != 5 for n in range(16)]  # in the next epoch it costs nothing


def test_what_dali_fails_at_and_pillow_reads(library, monkeypatch):
    decoder = dali.DaliDecoder(Views(View(16), None), CounterRNG(0), device="cpu")

    def fails(files):
        raise RuntimeError("nvJPEG error")

    monkeypatch.setattr(decoder, "_decoded", fails)
    found = decoder.batch([jpeg(0), jpeg(1)], [0, 1])
    assert all(torch.equal(got, decoder.pillow(jpeg(i), i)[0]) for i, (got, _) in enumerate(found))


def test_what_is_for_a_batch(library):
    decoder = dali.DaliDecoder(Views(View(16), None), CounterRNG(0), device="cpu")
    garbled = jpeg(0)[:2] + b"\xff\xe1\x00\x0cExif\0\0junk" + jpeg(0)[2:]
    for file in (
        jpeg(0),
        encoded(photo(0).convert("L"), "JPEG"),
        garbled,
        jpeg(0) + b"\0\0",
        jpeg(0, progressive=True),
    ):
        assert decoder.takes(file)
    others = [encoded(photo(0), "PNG"), encoded(photo(0).convert("CMYK"), "JPEG"), rotated(0), encoded(photo(0), "GIF")]
    for file in (b"", b"junk", jpeg(0)[:-2], jpeg(0)[:200], *others):
        assert not decoder.takes(file)
    for file in others:
        assert torch.equal(decoder(file, 0)[0], decoder.pillow(file, 0)[0])
    assert torch.equal(decoder(jpeg(2), 0)[0], decoder.pillow(jpeg(2), 0)[0])
    for file in (b"", jpeg(0)[:-300], jpeg(0)[:200]):
        with pytest.raises(BadImage):
            decoder(file, 0)


def test_damaged_files_and_several_in_one_are_pillows_to_judge(library):
    """DALI reads them, or as much as there is: a file is good or bad alike with either decoder."""
    decoder = dali.DaliDecoder(Views(View(16), None), CounterRNG(0), device="cpu")
    for options in ({}, {"progressive": True}):
        whole = jpeg(0, **options)
        scan = whole.index(b"\xff\xda")
        middle = (scan + len(whole)) // 2
        damaged = (
            whole[:middle] + jpeg(1),  # two in one cell, the first cut off
            whole[:middle] + b"\xff\xc0" + whole[middle + 2 :],
            whole[:middle] + b"\xff\x01" + whole[middle + 2 :],
            whole + jpeg(1),
            whole + b"junk\xff\xd9",
        )
        for file in damaged:
            assert not decoder.takes(file)
            try:
                want = decoder.pillow(file, 0)[0]
            except BadImage:
                with pytest.raises(BadImage):
                    decoder(file, 0)
            else:
                assert torch.equal(decoder(file, 0)[0], want)
        for file in (
            whole + b"\0",
            whole[:-2] + b"\xff\xff\xd9",
            whole[:scan] + b"\xff\xfe\0\x04\xff\xd8" + whole[scan:],
        ):
            assert decoder.takes(file)


# ---- in the loader ----


def batches(folder, decoder, steps=3, **options):
    config = DataConfig(images=str(folder), decoder=decoder, max_bad_fraction=0.5, **options)
    loader = open_loader(config, "reca", Views(View(16, "random_crop"), View(8)), seed=1, micro_batch=8)
    stream = iter(loader)
    made = [next(stream) for _ in range(steps)]
    loader.close()
    return made, loader


@pytest.fixture
def folder(tmp_path):
    """JPEGs, other formats, and bad files of both kinds."""
    for number in range(20):
        (tmp_path / f"{number:02}.jpg").write_bytes(jpeg(number))
    (tmp_path / "20.png").write_bytes(encoded(photo(3), "PNG"))
    (tmp_path / "21.jpg").write_bytes(rotated(4))
    (tmp_path / "22.jpg").write_bytes(jpeg(1)[:800])  # a download that broke off
    (tmp_path / "23.jpg").write_bytes(broken(jpeg(2)))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_those_of_pillow(library, folder, workers):
    """Formats mixed in one batch, substitutes of bad files, and the list of these: all as without DALI."""
    wanted, pillow = batches(folder, "pillow", workers=workers)
    found, loader = batches(folder, "dali", workers=workers)
    for got, want in zip(found, wanted, strict=True):
        assert got.sample_ids.tolist() == want.sample_ids.tolist()
        for name in ("gen", "und"):
            assert all(torch.equal(a, b) for a, b in zip(getattr(got, name), getattr(want, name), strict=True))
    assert set(loader.bad_samples.bad) == set(pillow.bad_samples.bad) == {"22.jpg", "23.jpg"}
    if library is not None and not workers:
        assert library[0] >= 4  # one call for all JPEGs of the first batch
    assert loader.images_per_s() > 0


def test_rows_by_number_are_decoded(library, folder):
    _, loader = batches(folder, "dali", 1, workers=0)
    row = loader.row_of(0)
    assert not row.encoded and row.gen.shape == (3, 16, 16)
    key, batch = loader.named_sample(0)
    assert key in {path.name for path in folder.iterdir()} and isinstance(batch, Batch) and len(batch) == 1


def test_views_on_a_gpu_are_kept_until_they_are_used(monkeypatch):
    """Memory of the decoder's stream is not given out again before the training stream has read it."""
    recorded = []

    class OnGPU(torch.Tensor):
        is_cuda = True

        def record_stream(self, stream):
            recorded.append(stream)

        def to(self, *_, **__):
            return self

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "training")
    gen = [torch.zeros(3, 2, 2).as_subclass(OnGPU)]
    moved = Batch("reca", torch.tensor([0]), ["a"], gen).to(torch.device("meta"))
    assert recorded == ["training"] and moved.gen[0] is gen[0]


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
def test_a_batch_on_a_gpu():
    """nvJPEG's inverse transform rounds differently, the views' arithmetic is the same."""
    if not dali.available():
        pytest.skip("DALI is not installed (pip install 'reca[dali]')")
    views = Views(View(48, "center_crop"), View(28, "pad"))
    decoder, pillow = dali.DaliDecoder(views, CounterRNG(0)), PillowDecoder(views, CounterRNG(0))
    files = [jpeg(i) for i in range(9)]
    files[4] = broken(files[4])
    found = decoder.batch(files, range(9))
    for number in (0, 1, 2, 3, 5, 6, 7, 8):
        for got, want in zip(found[number], pillow(files[number], number), strict=True):
            assert got.is_cuda and int((got.cpu().int() - want.int()).abs().max()) <= 3
