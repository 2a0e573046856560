"""Images that are deep, thin, huge, or carry broken metadata."""

import gzip
import struct
import warnings
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from reca.data import image_formats, pixels, transforms
from reca.data.pixels import BadImage, open_rgb
from reca.data.transforms import make_view
from reca.data.views import View
from tests.data.files import encoded, image_bytes


def grey(data):
    """The one value that all pixels have."""
    (value,) = np.unique(np.asarray(open_rgb(data)))
    return int(value)


def chunk(task, data, crc=None):
    crc = zlib.crc32(task + data) if crc is None else crc
    return struct.pack(">I", len(data)) + task + data + struct.pack(">I", crc)


def with_chunk(png, *chunks):
    """A PNG with chunks behind its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def with_segment(jpeg, marker, data):
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


# ---- deep ----


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "level"), [(0, 0), (200, 0), (255, 0), (260, 1), (32768, 128), (65535, 255)])
def test_sixteen_bits_are_scaled_by_their_mode(format, value, level):
    assert grey(encoded(Image.fromarray(np.full((8, 8), value, np.uint16)), format)) == level
    mixed = np.array([[value, 65535]], np.uint16)  # what else is in the image does not matter
    assert np.asarray(open_rgb(encoded(Image.fromarray(mixed), format)))[0, 0, 0] == level


def tiff(bits, photometric, data):
    """A grey TIFF of 2 x 1 pixels: a header, 8 entries of a directory, and the pixels behind them."""
    entries = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 8 * 12 + 4, 277: 1, 279: len(data)}
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + data


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (encoded(Image.fromarray(np.array([[0x8000, 0xFFFF]], ">u2")), "TIFF"), [128, 255]),
        (tiff(16, 1, struct.pack("<HH", 0x8000, 0xFFFF)), [128, 255]),
        (tiff(16, 0, struct.pack("<HH", 0x8000, 0xFFFF)), [127, 0]),  # white is zero
        (tiff(12, 1, b"\x80\x0f\xff"), [128, 255]),  # two pixels in three bytes
    ],
    ids=["big endian", "little endian", "white is zero", "12 bits"],
)
def test_other_codings_of_deep_grey(data, levels):
    assert np.asarray(open_rgb(data))[0, :, 0].tolist() == levels


def png(bits, coding, row, *chunks):
    """A PNG of one row of packed pixels; coding: 0 grey, 2 RGB."""
    width = len(row) * 8 // (bits * {0: 1, 2: 3}[coding])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, coding, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("bits", "coding", "row", "clear", "levels"),
    [
        (1, 0, b"\x55", (0,), [255] * 8),
        (1, 0, b"\x55", (1,), [0, 255] * 4),  # what shows is black, what does not is white
        (2, 0, b"\x1b", (2,), [0, 85, 255, 255]),
        (4, 0, b"\x7f", (7,), [255, 255]),
        (4, 0, b"\x7f", (15,), [7 * 17, 255]),
        (8, 0, b"\x07\x08", (7,), [255, 8]),
        (8, 2, b"\x07\x07\x07\x08\x08\x08", (7, 7, 7), [255, 8]),
        (16, 2, b"\x07\x09" * 3 + b"\x09\x07" * 3, (0x0709,) * 3, [255, 9]),
        (16, 2, b"\x00\x00" * 3 + b"\x01\x00" * 3, (0x0100,) * 3, [0, 255]),
    ],
)
def test_a_transparent_colour_is_compared_in_the_bits_of_the_file(bits, coding, row, clear, levels):
    clear = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    assert np.asarray(open_rgb(png(bits, coding, row, clear)))[0, :, 0].tolist() == levels


def test_one_grey_of_sixteen_bits_may_be_transparent():
    values = np.array([[1000, 40000]], np.uint16)
    png = encoded(Image.fromarray(values), "PNG")
    got = np.asarray(open_rgb(with_chunk(png, chunk(b"tRNS", struct.pack(">H", 1000)))))
    assert got[0, :, 0].tolist() == [255, 40000 >> 8]


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_pixels_without_a_fixed_white_are_refused(values):
    with pytest.raises(BadImage, match="white is undefined: save it with 8 or 16 bits"):
        open_rgb(encoded(Image.fromarray(values), "TIFF"))


# ---- thin and huge ----


@pytest.mark.parametrize("fit", ["squash", "stretch", "center_crop", "clip_crop", "random_crop", "pad", "bound"])
@pytest.mark.parametrize("size", [(30000, 1), (1, 30000), (8000, 2)])
def test_thin_images_make_no_large_ones(fit, size, monkeypatch):
    """A square of the long side has 900 million pixels."""
    made, centred, resize = [], transforms._centred, transforms._resize

    def counted_centred(image, side, fill):
        made.append(side**2)
        return centred(image, side, fill)

    def counted_resize(image, size, *options):
        made.extend((size[0] * size[1], size[0] * image.shape[1]))  # filtered along the rows, then down the columns
        return resize(image, size, *options)

    monkeypatch.setattr(transforms, "_centred", counted_centred)
    monkeypatch.setattr(transforms, "_resize", counted_resize)
    view = make_view(Image.new("RGB", size), View(512, fit, min_size=256, stride=16, blur=2))
    assert max(view.shape[1:]) == 512 and 0 < max(made) <= 512 * 30000


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (3000, 300), (200, 3000)])
@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_thin_images_are_what_the_square_would_give(fit, size, monkeypatch):
    """Resizing before the square is made changes the levels by rounding; at pad's edges, by what the filter mixes."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, view = Image.fromarray(noise), View(64, fit)
    thin = make_view(image, view).float()
    monkeypatch.setattr(transforms, "_too_large", lambda *_: False)
    square = make_view(image, view).float()
    if fit == "stretch":
        assert (thin - square).abs().max() <= 2
    else:
        assert (thin - square).abs().mean() < 3 and thin.shape == square.shape


def test_decompression_bombs_are_bad_images(monkeypatch):
    def header(width, height, depth=8, colour=0):
        ihdr = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        return PngImagePlugin._MAGIC + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    for width, height in ((20000, 20000), (2**15 + 1, 1), (8193, 8192), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(BadImage, match="pixels"):
            open_rgb(header(width, height))
    monkeypatch.setattr(pixels, "MAX_PIXELS_WEBP", 63)
    with pytest.raises(BadImage, match="8 x 8 pixels; the limits are 32768 per side and 63 in total"):
        open_rgb(image_bytes(format="WEBP"))


def test_large_photos_are_decoded_at_half_the_size(monkeypatch):
    photo = Image.effect_noise((12, 8), 90).resize((120, 80)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    half = photo.resize((60, 40), Image.Resampling.BOX)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 120 * 80 - 1)
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        file = encoded(photo, "JPEG", quality=95, exif=exif, **options)
        got = open_rgb(file)
        want = np.asarray(half.transpose(Image.Transpose.ROTATE_270)).astype(int)
        assert got.size == (40, 60) and np.abs(np.asarray(got) - want).mean() < 2
    monkeypatch.setattr(pixels, "MAX_PIXELS_JPEG", 120 * 80 - 1)
    with pytest.raises(BadImage, match="120 x 80 pixels; the limits are 32768 per side and 9599 in total"):
        open_rgb(file)
    for mode, format in (("CMYK", "JPEG"), ("RGB", "PNG")):  # whose decoders hold more, or know no half
        with pytest.raises(BadImage, match="9599 in total"):
            open_rgb(image_bytes(0, (120, 80), mode, format))


def test_a_photo_of_100_megapixels():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert open_rgb(image_bytes(77, (11648, 8736), "L", "JPEG")).size == (5824, 4368)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (bytes(600), "the file begins with only zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the file is a Git LFS pointer"),
        (b"<!DOCTYPE html><title>404</title>", "the file is a web page"),
        (gzip.compress(b"x", mtime=0), "the file is compressed by gzip; unpack it first"),
        (b"<?xml version='1.0'?><svg/>", "not an image in a supported format"),
        (b"\x89PNG\r\n\x1a\n", "not an image in a supported format"),
    ],
)
def test_what_stands_in_the_place_of_a_image(data, words):
    with pytest.raises(BadImage, match=words):
        open_rgb(data)


def test_files_of_formats_that_need_more_name_them(monkeypatch):
    for brand in (b"heic", b"mif1"):
        with pytest.raises(BadImage, match="not an image in a supported format .* but HEIC: convert it"):
            open_rgb(b"\0\0\0\x18ftyp" + brand + bytes(99))
    avif = b"\0\0\0\x18ftypavif" + bytes(99)  # the beginning of one
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)  # as in Pillow before 11.3
    monkeypatch.setattr(image_formats.features, "check", lambda name: name != "avif")
    image_formats.known_formats.cache_clear()
    try:
        with pytest.raises(BadImage, match="AVIF: install Pillow 11.3 or later"):
            open_rgb(avif)
        with pytest.raises(BadImage, match="the file is a web page"):
            open_rgb(b"<!DOCTYPE html>")
    finally:
        image_formats.known_formats.cache_clear()


def test_too_little_memory_is_no_fault_of_the_file(monkeypatch):
    """Pillow's decoders of WebP and AVIF raise MemoryError."""
    data = image_bytes()
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError, match="too little memory is free to decode the image"):
        open_rgb(data)


def test_large_images_are_converted_in_strips(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (70, 50, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "PNG")
    whole = np.asarray(open_rgb(data))
    monkeypatch.setattr(pixels, "STRIP", 130)
    assert np.array_equal(np.asarray(open_rgb(data)), whole)


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "EPS", "PDF", "ICNS", "QOI"])
def test_only_listed_formats_are_opened(format):
    with pytest.raises(BadImage, match="not an image in a supported format"):
        open_rgb(image_bytes(size=(16, 16), format=format))


# ---- metadata ----


def test_large_text_costs_no_image():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    assert open_rgb(image_bytes(pnginfo=info)).getpixel((0, 0)) == (200, 30, 30)
    info = PngImagePlugin.PngInfo()
    for number in range(70):
        info.add_text(f"page {number}", "x" * 999_999, zip=True)
    assert open_rgb(image_bytes(pnginfo=info)).getpixel((0, 0)) == (200, 30, 30)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 2_000_000, zip=True)
    assert open_rgb(image_bytes(pnginfo=info)).getpixel((0, 0)) == (200, 30, 30)


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**21))),
        chunk(b"iCCP", b"p\0\7junk"),
        chunk(b"zTXt", b"k\0\7junk"),
        chunk(b"tEXt", b"k\0junk", crc=7),
        chunk(b"eXIf", b"junk"),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
        chunk(b"pHYs", b"1"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"12"),
        chunk(b"sRGB", b""),
        chunk(b"acTL", b"1"),
        chunk(b"fcTL", bytes(26)),
        chunk(b"zzZz", b"unknown"),
    ],
    ids=lambda data: data[4:8].decode(),
)
def test_broken_chunks_cost_no_image(broken):
    assert open_rgb(with_chunk(image_bytes(), broken)).getpixel((7, 7)) == (200, 30, 30)


def test_orientation_and_transparency_outlive_broken_chunks():
    exif = Image.Exif()
    exif[0x0112] = 6
    bad = chunk(b"tEXt", b"k\0junk", crc=7)
    assert open_rgb(with_chunk(image_bytes(size=(40, 24), exif=exif), bad)).size == (24, 40)
    clear = image_bytes((255, 0, 0), mode="RGB", transparency=(255, 0, 0))
    assert open_rgb(with_chunk(clear, bad)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("marker", "data"),
    [
        (0xE1, b"Exif\0\0junk"),
        (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta"),
        (0xE2, b"MPF\0junk"),
        (0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2"),
        (0xE2, b"ICC_PROFILE\0\1\2junk"),
        (0xED, b"Photoshop 3.0\x008BIM\4\x04"),
        (0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 40),
        (0xE0, b"JFIF\0"),
        (0xFE, b"comment\xff"),
    ],
)
def test_broken_segments_cost_no_image(marker, data):
    assert open_rgb(with_segment(image_bytes(format="JPEG", quality=100), marker, data)).size == (8, 8)


def test_garbled_orientation_is_upright():
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        for format in ("JPEG", "PNG", "WEBP"):
            assert open_rgb(image_bytes(size=(40, 24), format=format, exif=exif)).size == (40, 24)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": True}])
def test_a_jpeg_that_ends_in_zeros_is_cut_off(options):
    """As an interrupted download into a file of full size is. libjpeg decodes the zeros as grey."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    if options.pop("exif", False):  # with a preview, which has an end of its own
        options["exif"] = b"Exif\0\0II*\0\x08\0\0\0\0\0" + image_bytes(format="JPEG")
    data = encoded(noise, "JPEG", **options)
    for kept in (len(data) * 9 // 10, len(data) - 2):
        with pytest.raises(BadImage, match="the JPEG is cut off|truncated"):
            open_rgb(data[:kept] + bytes(len(data) - kept))
    padded, after = open_rgb(data + bytes(999)), open_rgb(data + b"junk" * 99)
    assert np.array_equal(padded, open_rgb(data)) and np.array_equal(after, open_rgb(data))
