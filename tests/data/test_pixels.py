"""From bytes to views: every task of file, every fit. test_dali.py has the other decoder."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from reca.data import pixels, transforms
from reca.data.cache import VERSION
from reca.data.errors import DataError
from reca.data.pixels import BadImage, open_rgb, read_image, shown_size
from reca.data.transforms import PillowDecoder, bound_size, make_view
from reca.data.views import View, Views
from reca.rng import CounterRNG
from tests.data.files import encoded

FITS = ["squash", "stretch", "center_crop", "clip_crop", "random_crop", "pad", "letterbox", "bound"]


def drawn(width=40, height=24, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 5 % 256, y * 9 % 256, (x + y) * 3 % 256], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("RGB", "WEBP"),
    ],
)
def test_every_mode_becomes_rgb(mode, format):
    image = open_rgb(encoded(drawn(mode=mode), format))
    assert image.mode == "RGB" and image.size == (40, 24)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_rgb(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert open_rgb(encoded(half)).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)


def test_sixteen_bits_keep_their_upper_eight():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = np.asarray(open_rgb(encoded(Image.fromarray(values))))[..., 0]
    assert np.abs(got.astype(int) - (values / 257).astype(int)).max() <= 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(encoded(drawn(), "JPEG", exif=exif)).size == (24, 40)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("value", [*range(10), 65535])
def test_the_size_that_is_shown_is_that_of_the_decoded_image(format, value):
    """Pillow turns a TIFF itself; an orientation beyond 8 is none."""
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(drawn(), format, exif=exif)
    assert shown_size(data) == open_rgb(data).size == ((24, 40) if value in (5, 6, 7, 8) else (40, 24))


def test_the_size_that_is_shown_needs_no_metadata():
    large = PngImagePlugin.PngInfo()
    large.add_text("workflow", "x" * 2_000_000, zip=True)
    assert shown_size(encoded(drawn(), pnginfo=large)) == (40, 24)
    with pytest.raises(BadImage, match="the file is empty"):
        shown_size(b"")


JPEG = encoded(drawn(200, 120), "JPEG", quality=92)


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"<html><body>404</body></html>", JPEG[: len(JPEG) // 2], encoded(drawn())[:60]],
    ids=["empty", "text", "html", "truncated jpeg", "truncated png"],
)
def test_broken_bytes_are_bad_images(data):
    with pytest.raises(BadImage):
        open_rgb(data)


def test_what_is_said_of_no_image(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_image(tmp_path)
    with pytest.raises(DataError, match="none.png does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match="text.png is not a readable image: not an image in a supported format"):
        read_image(tmp_path / "text.png")


@pytest.mark.parametrize("fit", ["squash", "stretch", "center_crop", "clip_crop", "random_crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (40, 24), (24, 40)])
def test_fits_give_the_asked_size_from_any_image(fit, size):
    view = make_view(drawn(*size), View(16, fit=fit), crop=0.99)
    assert view.shape == (3, 16, 16) and view.dtype == torch.uint8 and view.is_contiguous()


def test_squash_is_pillows_bicubic():
    expected = np.asarray(drawn().resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(make_view(drawn(), View(16)).permute(1, 2, 0).numpy(), expected)


def test_stretch_filters_twice():
    """Harmon's data code: to a square of the long side, then to the size."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    once, twice = (make_view(image, View(16, fit=fit)).permute(1, 2, 0).numpy() for fit in ("squash", "stretch"))
    square = image.resize((40, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(twice, np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC)))
    assert not np.array_equal(once, twice)


def test_center_crop_takes_the_middle_and_pad_keeps_everything():
    stripes = Image.new("RGB", (30, 10), "red")
    stripes.paste("blue", (10, 0, 20, 10))
    assert make_view(stripes, View(10, fit="center_crop"))[:, 5, 5].tolist() == [0, 0, 255]
    padded = make_view(stripes, View(30, fit="pad", fill=127))
    assert padded[:, 1, 15].tolist() == [127] * 3 and padded[:, 15, 15].tolist() == [0, 0, 255]


SIZES = [(64, 48), (48, 64), (100, 67), (67, 100), (50, 37), (99, 98), (31, 31), *((33, 33 + n) for n in range(1, 9))]


def grey_noise(size):
    return Image.fromarray(np.random.default_rng(0).integers(90, 166, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [33, 56])
def test_clip_crop_is_that_of_clips_processor(size, side):
    """Up to rounding between the two passes: a long side that is one pixel longer moves half of the image."""
    transforms = pytest.importorskip("transformers.image_transforms")
    image = grey_noise(size)
    shape = transforms.get_resize_output_image_size(np.asarray(image), side, default_to_square=False)
    whole = np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC))
    want = transforms.center_crop(whole, (side, side)).transpose(2, 0, 1).astype(int)
    assert np.abs(make_view(image, View(side, fit="clip_crop")).numpy() - want).max() <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [33, 56])
def test_center_crop_is_that_of_torchvision(size, side):
    """Resize(side) and CenterCrop(side), as torchvision 0.28 computes them, up to rounding as above."""
    image, short = grey_noise(size), min(size)
    shape = [int(side * length / short) for length in size]
    left, top = (round((length - side) / 2.0) for length in shape)
    whole = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    want = whole[top : top + side, left : left + side].transpose(2, 0, 1).astype(int)
    assert np.abs(make_view(image, View(side, fit="center_crop")).numpy() - want).max() <= 1


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (33, 40)])
@pytest.mark.parametrize("side", [16, 33, 56])
def test_a_random_crop_is_cut_before_it_is_resized(size, side):
    """What lies beside the crop does not reach its border."""
    image, short = drawn(*size), min(size)
    left, top = (int(0.7 * (length - short + 1)) for length in size)
    cut = image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
    assert torch.equal(make_view(image, View(side, fit="random_crop"), crop=0.7), pixels.pixels_of(cut))


def test_pixels_are_those_of_the_version_of_cached_features():
    """Whoever changes the pixels of a view raises VERSION: features that a cache holds are of the pixels before."""
    if not transforms._resizes_as_pillow():
        pytest.skip("an older Pillow, or no compiled module: other bits")
    made = hashlib.sha256()
    for size, mode in itertools.product([(67, 100), (36, 33), (33, 40), (30, 30)], ["RGB", "LA"]):
        image = open_rgb(encoded(drawn(*size, mode)))
        for fit, blur in itertools.product(FITS, [1, 4]):
            made.update(make_view(image, View(33, fit, min_size=16, stride=16, blur=blur)).numpy().tobytes())
    assert (VERSION, made.hexdigest()[:16]) == (2, "06b1bf747b5fa933")


def test_random_crop_is_a_function_of_the_sample():
    decoder = PillowDecoder(Views(gen=View(16, fit="random_crop"), und=None), CounterRNG(3))
    data = encoded(drawn(90, 20))
    views = [decoder(data, i)[0] for i in range(6)]
    assert torch.equal(views[2], decoder(data, 2)[0])
    assert len({v.numpy().tobytes() for v in views}) > 3


def test_blur_removes_detail_and_keeps_size():
    noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    sharp, soft = make_view(image, View(32)).float(), make_view(image, View(32, blur=8)).float()
    assert soft.shape == sharp.shape and soft.diff(dim=2).abs().mean() < 0.2 * sharp.diff(dim=2).abs().mean()


@pytest.mark.parametrize(
    ("size", "view", "expected"),
    [  # BAGEL's rule (models' pages): understanding at 224, target between 512 and 1024
        ((1024, 768), View(224, fit="bound", min_size=224, stride=14), (224, 168)),
        ((1024, 1024), View(1024, fit="bound", min_size=512, stride=16), (1024, 1024)),
        ((300, 200), View(1024, fit="bound", min_size=512, stride=16), (768, 512)),
        ((4000, 400), View(1024, fit="bound", min_size=512, stride=16), (1024, 96)),
        # 2000 x 1330 has too many pixels: its sides shrink by the ratio of the areas, 0.0451, as in the release
        ((3000, 2000), View(2000, fit="bound", min_size=100, stride=10, max_pixels=120000), (90, 60)),
        ((3000, 2000), View(2000, fit="bound", min_size=100, stride=10, max_pixels=2660000), (2000, 1330)),
    ],
)
def test_bound_sizes(size, view, expected):
    assert bound_size(*size, view) == expected


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (40, 24), (24, 40)])
@pytest.mark.parametrize("memory", ["one block", "strips", "blocks", "no module", "old Pillow"])
def test_pixels_of_pillow(size, memory, monkeypatch):
    """An image above STRIP, memory in blocks that are not Arrow's, and what is used without Arrow."""
    if memory == "strips":
        monkeypatch.setattr(pixels, "STRIP", 100)
    elif memory == "no module":
        monkeypatch.setattr("reca_kernels.native.module", None)
    elif memory == "old Pillow":
        monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)
    before = Image.core.get_block_size()
    if memory == "blocks":
        Image.core.set_block_size(4096)
    try:
        image = drawn(*size)
        large = image.resize((size[0], 64 * size[1]))
        for one in (image, large):
            want = np.array(one).transpose(2, 0, 1)
            got = pixels.pixels_of(one)
            del one  # the tensor does not share Pillow's memory
            assert got.dtype == torch.uint8 and np.array_equal(got, want)
    finally:
        Image.core.set_block_size(before)


def test_views_are_made_under_any_default_device():
    transforms._resizes_as_pillow.cache_clear()
    image = torch.zeros(3, 40, 30, dtype=torch.uint8)
    with torch.device("meta"):
        assert make_view(image, View(16)).shape == (3, 16, 16)
