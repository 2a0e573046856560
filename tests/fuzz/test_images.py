"""Images in all formats that Pillow writes, damaged: a view, or BadImage."""

import io
import struct
import warnings
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reca.data.image_formats import FORMATS
from reca.data.pixels import MAX_PIXELS, BadImage, open_rgb
from reca.data.transforms import make_view
from reca.data.views import View
from tests.fuzz.bounds import counted
from tests.fuzz.mutate import mutate, mutations

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F")
OPTIONS = {
    "JPEG": ({}, {"progressive": True}),
    "TIFF": ({}, {"compression": "tiff_lzw"}),
    "WEBP": ({}, {"lossless": True}),
}
FITS = ("squash", "stretch", "center_crop", "clip_crop", "random_crop", "pad", "bound")
PNG = b"\x89PNG\r\n\x1a\n"


def seeds():
    """{name: bytes} of a small image in every format and mode that Pillow can write."""
    Image.init()
    noise = Image.effect_noise((24, 16), 80)
    rgb = Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for format in sorted(Image.SAVE):
        for mode in MODES:
            for number, options in enumerate(OPTIONS.get(format, ({},))):
                buffer = io.BytesIO()
                try:
                    image = rgb.convert("I").convert(mode) if mode == "I;16" else rgb.convert(mode)
                    image.save(buffer, format, exif=exif, **options)
                except Exception:  # formats do not take every mode
                    continue
                found[f"{format} {mode} {number}"] = buffer.getvalue()
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of formats that Pillow will drop
    SEEDS = seeds()
READ = {name: data for name, data in SEEDS.items() if name.split()[0] in FORMATS}


def with_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums, so that damage reaches what is behind them."""
    data, place = bytearray(data), len(PNG)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return bytes(data)


@pytest.mark.parametrize("name", READ)
def test_sound_images_are_read(name):
    if name.split()[1] in ("I", "F") and name.startswith("TIFF"):
        with pytest.raises(BadImage, match="white is undefined"):
            open_rgb(READ[name])
    else:
        assert sorted(open_rgb(READ[name]).size) == [16, 24]


@pytest.mark.filterwarnings("ignore")
@given(
    name=st.one_of(st.sampled_from(sorted(READ)), st.sampled_from(sorted(SEEDS))),
    changes=mutations(),
    repair=st.booleans(),
    fit=st.sampled_from(FITS),
)
def test_damaged_images_are_views_or_bad_images(name, changes, repair, fit):
    data = mutate(SEEDS[name], changes)
    if repair and data.startswith(PNG):
        data = with_sums(data)
    with counted("images"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = open_rgb(data)
        except BadImage:
            return
        assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
        view = make_view(image, View(32, fit, min_size=16, stride=8), crop=0.5)
        assert (
            view.dtype == torch.uint8 and view.shape[0] == 3 and 1 <= min(view.shape[1:]) <= max(view.shape[1:]) <= 32
        )
