"""Decoding of image files to upright RGB pixels, and encoding. Pillow's decoder is the reference for DALI's."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from reca.data.errors import BadSample, DataError
from reca.data.image_formats import known_formats, unidentified
from reca.data.metadata import lacks_end, without_metadata
from reca.io.files import HEAD
from reca.io.image_grid import to_pil
from reca.io.paths import exists, is_file
from reca_kernels import native
from reca_kernels.image_planes.op import arrow_planes

MAX_SIDE = 2**15  # a larger side is treated as a corrupt header
MAX_PIXELS = 2**26  # 8192 x 8192, which need 0.8 GB for decoding and conversion to RGB
MAX_PIXELS_WEBP = 2**25  # its decoder needs memory for three images
MAX_PIXELS_JPEG = 2**27  # 16384 x 8192: above MAX_PIXELS decoded at half the size, which needs at most 0.9 GB
STRIP = 2**22  # pixels that are converted at a time: as many as Pillow keeps in one block of memory
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow's raw mode of a grey PNG -> size of one level in 8 bits
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF: two tags, and a value of the second
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
T = TypeVar("T")


# Pillow warns of images between its own limit and MAX_PIXELS_JPEG.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BadImage(BadSample):
    """Error for bytes that are not a readable image. The message is the reason."""


def open_rgb(data: bytes) -> Image.Image:
    """Decode an image to upright RGB: transparency on white, 16 bits cut to the upper 8. Raises BadImage.

    A JPEG of more than MAX_PIXELS is decoded at half its width and height.
    """
    return _with_or_without_metadata(_open_rgb, data)


def shown_size(data: bytes) -> tuple[int, int]:
    """Return the width and height of an image after its EXIF orientation is applied. Raises BadImage."""
    return _with_or_without_metadata(_shown_size, data)


def _with_or_without_metadata(read: Callable[[bytes], T], data: bytes) -> T:
    try:
        return read(data)
    except BadImage:
        bare = without_metadata(data)
        if bare is not None and len(bare) < len(data):
            with contextlib.suppress(BadImage):
                return read(bare)
        raise


def _shown_size(data: bytes) -> tuple[int, int]:
    with opened(data) as file:
        if file.format == "TIFF":
            file.load()  # rotates it upright; before, width and height may be swapped
        width, height = file.size
        return (height, width) if orientation(file) in SIDEWAYS else (width, height)


def _open_rgb(data: bytes) -> Image.Image:
    with opened(data) as file:
        if file.width * file.height > MAX_PIXELS:
            file.draft(None, (file.width // 2, file.height // 2))
        _scale_transparency(file)
        file.load()
        if file.format in ("JPEG", "MPO") and lacks_end(data):  # libjpeg decodes zeros as grey
            raise BadImage("the JPEG is cut off: it has no end marker")
        return as_rgb(file)


def as_rgb(file: Image.Image) -> Image.Image:
    """Convert an image to upright RGB: transparency on white, 16 bits cut to the upper 8. Raises BadImage."""
    method = TRANSPOSE.get(orientation(file))
    image = file if method is None else file.transpose(method)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, file)
    return _flatten(image)


def _scale_transparency(file: ImageFile.ImageFile) -> None:
    """Convert the transparent colour of a PNG to 8 bits, the depth of the pixels that it is compared with.

    Pillow leaves it at the file's depth: 2, 4 or 16 bits. Of 16 bits both keep the upper 8.
    """
    color: Any = file.info.get("transparency")
    if file.format != "PNG" or not file.tile or not isinstance(color, int | tuple):
        return
    coding = file.tile[0].args
    if coding in GREY_STEPS:
        file.info["transparency"] = color * GREY_STEPS[coding]
    elif coding == "RGB;16B" and isinstance(color, tuple):
        file.info["transparency"] = tuple(value >> 8 for value in color)


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open an image file and check its header. Raises BadImage, also for exceptions raised within the context."""
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as file:
            limit = _most_pixels(file)
            if max(file.size) > MAX_SIDE or file.width * file.height > limit:
                raise BadImage(
                    f"{file.width} x {file.height} pixels; the limits are {MAX_SIDE} per side and {limit} in total"
                )
            yield file
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise BadImage(unidentified(data[:HEAD])) from error
    except MemoryError as error:  # which says nothing about the file
        raise MemoryError("too little memory is free to decode the image: free some, or lower data.workers") from error
    except Exception as error:  # Pillow's decoders raise many types for damaged bytes
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _most_pixels(file: Image.Image) -> int:
    """Return the pixel limit of the file's format."""
    if file.format == "WEBP":
        return MAX_PIXELS_WEBP
    if file.format in ("JPEG", "MPO") and file.mode in ("RGB", "L"):
        return MAX_PIXELS_JPEG
    return MAX_PIXELS


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (upright) if it is missing or corrupt."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types for corrupt EXIF
        return 1


def _eight_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits by its bit depth, not by its values, so that all images are scaled alike.

    Raises BadImage if the format does not define the value of white.
    """
    # Older versions of Pillow open a 16-bit PNG in mode "I".
    if not image.mode.startswith("I;16") and not (image.mode == "I" and file.format == "PNG"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise BadImage(f"pixels are {kind}, for which white is undefined: save it with 8 or 16 bits")
    tags = getattr(file, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image)
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _flatten(image: Image.Image) -> Image.Image:
    """Convert to RGB, transparency on white. Work in strips, to avoid temporary copies of the whole image."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    whole, top = Image.new("RGB", image.size), 0
    for strip in _strips(image):
        if image.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        whole.paste(strip.convert("RGB"), (0, top))
        top += strip.height
    return whole


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """Yield the image from top to bottom in copies of at most STRIP pixels; the image itself if it has no more."""
    rows = max(1, STRIP // image.width)
    if image.height <= rows:
        yield image
        return
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def read_image(path: str | Path) -> Tensor:
    """Read an image file: uint8 [3, H, W]. Raises DataError."""
    path = Path(path)
    if not is_file(path):
        raise DataError(f"image {path} {'is not a file' if exists(path) else 'does not exist'}")
    try:
        return pixels_of(open_rgb(path.read_bytes())).contiguous()
    except BadImage as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def pixels_of(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3, H, W].

    Pillow's memory is read in place through its Arrow interface. `np.array` takes several times as long, and holds the
    GIL meanwhile, for which the thread that launches kernels would wait.
    """
    strips = [_planes(strip) for strip in _strips(image)]
    return strips[0] if len(strips) == 1 else torch.cat(strips, 1)


def _planes(image: Image.Image) -> Tensor:
    if native.module and hasattr(image, "__arrow_c_array__"):  # since Pillow 11.2
        try:
            _, array = image.__arrow_c_array__()
        except ValueError:  # the memory is in several blocks: the process has set PILLOW_BLOCK_SIZE
            pass
        else:
            return arrow_planes(array, image.height, image.width)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encode_png(pixels: Tensor) -> bytes:
    """Encode an image, uint8 [3, H, W], as the bytes of a PNG file."""
    file = io.BytesIO()
    to_pil(pixels).save(file, "PNG")
    return file.getvalue()
