"""Decoding of image bytes into the views of an adapter. Pillow's decoder is the reference for DALI's."""

import contextlib
import functools
import io
import math
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
from reca.data.views import View, Views
from reca.io.files import HEAD
from reca.io.image_grid import to_pil
from reca.rng import CounterRNG, RandomStream
from reca_kernels.image_planes import op as planes
from reca_kernels.resize.op import compiled, resize

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_SIDE = 2**15  # a larger side is treated as a corrupt header
MAX_PIXELS = 2**26  # 8192 x 8192, which need 0.8 GB for decoding and conversion to RGB
MAX_PIXELS_WEBP = 2**25  # its decoder needs memory for three images
MAX_PIXELS_JPEG = 2**27  # 16384 x 8192: above MAX_PIXELS decoded at half the size, which needs at most 0.9 GB
SMALL = 2**22  # pixels
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
        if bare is None or len(bare) == len(data):
            raise
        try:
            return read(bare)
        except BadImage:
            pass
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
    if not path.is_file():
        raise DataError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        return pixels_of(open_rgb(path.read_bytes())).contiguous()
    except BadImage as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def bound_size(width: int, height: int, view: View) -> tuple[int, int]:
    """Compute (width, height) for fit "bound" (see View), with the rounding and the area rule of BAGEL."""

    def rounded(w: float, h: float, scale: float) -> tuple[int, int]:
        across, down = (max(view.stride, round(round(side * scale) / view.stride) * view.stride) for side in (w, h))
        return across, down

    scale = min(view.size / max(width, height), 1.0)
    scale = max(scale, view.min_size / min(width, height))
    w, h = rounded(width, height, scale)
    if view.max_pixels and w * h > view.max_pixels:
        w, h = rounded(w, h, view.max_pixels / (w * h))
    if max(w, h) > view.size:
        w, h = rounded(w, h, view.size / max(w, h))
    return w, h


def geometry(width: int, height: int, view: View) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Compute the source box (left, top, right, bottom) and the target (width, height) of a view."""
    whole, short = (0, 0, width, height), min(width, height)
    if view.fit in ("squash", "stretch", "pad", "random_crop"):
        return whole, (view.size, view.size)
    if view.fit == "letterbox":  # size within the square, rounded like Janus
        across, down = (max(int(side / max(width, height) * view.size), view.min_size, 1) for side in (width, height))
        return whole, (across, down)
    if view.fit == "bound":
        return whole, bound_size(width, height, view)
    if view.fit in ("center_crop", "clip_crop"):  # resize the short side, then crop at whole pixels
        w, h = (int(view.size * side / short) for side in (width, height))  # both round down
        whole_pixels = round if view.fit == "center_crop" else int
        left, top = (whole_pixels((side - view.size) / 2) for side in (w, h))
        box = (left / w * width, top / h * height, (left + view.size) / w * width, (top + view.size) / h * height)
        return box, (view.size, view.size)
    raise ValueError(f"unknown fit {view.fit!r}; expected squash, stretch, center_crop, clip_crop, random_crop, "
                     "pad, letterbox or bound")  # fmt: skip


def make_view(image: Image.Image | Tensor, view: View, crop: float = 0.5) -> Tensor:
    """Crop and resize an image to a view: uint8 [3, H, W] on the device of the image. A tensor is uint8 [3, H, W].

    crop: position of a random crop along the longer side, in [0, 1).
    """
    pixels = pixels_of(image) if isinstance(image, Image.Image) else image
    if view.fit == "random_crop":
        pixels = _square(pixels, crop)
    elif view.fit in ("pad", "stretch"):
        pixels = (_pad if view.fit == "pad" else _stretch)(pixels, view)
    box, size = geometry(pixels.shape[2], pixels.shape[1], view)
    pixels = _resize(pixels, size, view.resample, box)
    if view.fit == "letterbox":
        pixels, size = _centred(pixels, max(size), view.fill), (max(size), max(size))
    if view.blur > 1:
        small = max(1, math.ceil(size[0] / view.blur)), max(1, math.ceil(size[1] / view.blur))
        pixels = _resize(_resize(pixels, small, "bilinear"), size, "bilinear")
    return pixels


def pixels_of(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3, H, W].

    Pillow's memory is read in place through its Arrow interface. `np.array` takes several times as long, and holds the
    GIL meanwhile, for which the thread that launches kernels would wait.
    """
    strips = [_planes(strip) for strip in _strips(image)]
    return strips[0] if len(strips) == 1 else torch.cat(strips, 1)


def _planes(image: Image.Image) -> Tensor:
    if planes.compiled() and hasattr(image, "__arrow_c_array__"):  # since Pillow 11.2
        try:
            _, array = image.__arrow_c_array__()
        except ValueError:  # the memory is in several blocks: the process has set PILLOW_BLOCK_SIZE
            pass
        else:
            return planes.arrow_planes(array, image.height, image.width)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encode_png(pixels: Tensor) -> bytes:
    """Encode an image, uint8 [3, H, W], as the bytes of a PNG file."""
    file = io.BytesIO()
    to_pil(pixels).save(file, "PNG")
    return file.getvalue()


Box = tuple[float, float, float, float]


def _resize(pixels: Tensor, size: tuple[int, int], resample: str, box: Box | None = None) -> Tensor:
    """Resize to (width, height), bit-identical to Pillow; use Pillow itself if the CPU kernel is not."""
    if pixels.is_cuda or _resizes_as_pillow():
        return resize(pixels, size[::-1], filter=resample, box=box)
    return pixels_of(_by_pillow(pixels, size, resample, box)).contiguous()


def _by_pillow(pixels: Tensor, size: tuple[int, int], resample: str, box: Box | None = None) -> Image.Image:
    return to_pil(pixels).resize(size, RESAMPLE[resample], box=box)


@functools.cache
def _resizes_as_pillow() -> bool:
    """Return whether the C++ kernel is available and bit-identical to the installed Pillow.

    Before version 13, Pillow always resized along the rows first.
    """
    if not compiled():
        return False
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 61, 47), generator=random, dtype=torch.uint8, device="cpu")
    cases = [
        (size, name, box)
        for size in ((30, 40), (47, 20), (20, 61), (94, 30), (100, 130))
        for name in RESAMPLE
        for box in (None, (3.25, 2.0, 40.5, 60.75))
    ]
    return all(
        torch.equal(resize(noise, size[::-1], filter=name, box=box), pixels_of(_by_pillow(noise, size, name, box)))
        for size, name, box in cases
    )


def _square(pixels: Tensor, crop: float) -> Tensor:
    """Crop a square of the short side before resizing, so that pixels outside of it do not affect its border."""
    short = min(pixels.shape[1:])
    top, left = (int(crop * (side - short + 1)) for side in pixels.shape[1:])
    return pixels[:, top : top + short, left : left + short]


def _too_large(side: int, width: int, height: int) -> bool:
    """Return whether a square is much larger than its image, as for a narrow image."""
    return side**2 > max(SMALL, min(4 * width * height, MAX_PIXELS))


def _pad(pixels: Tensor, view: View) -> Tensor:
    """Pad the image to a square of its long side.

    If that square is too large, the image is resized to its final size first.
    """
    height, width = pixels.shape[1:]
    side = max(width, height)
    if _too_large(side, width, height):
        inner = max(1, round(width * view.size / side)), max(1, round(height * view.size / side))
        pixels, side = _resize(pixels, inner, view.resample), view.size
    return _centred(pixels, side, view.fill)


def _centred(pixels: Tensor, side: int, fill: int) -> Tensor:
    """Place the image in the centre of a square."""
    height, width = pixels.shape[1:]
    left, top = (side - width) // 2, (side - height) // 2
    square = pixels.new_full((3, side, side), fill)
    square[:, top : top + height, left : left + width] = pixels
    return square


def _stretch(pixels: Tensor, view: View) -> Tensor:
    """Resize the image to a square of its long side.

    If that square is too large, the long side is first reduced to the view's size, then the short side enlarged: the
    two filters commute, up to intermediate rounding.
    """
    height, width = pixels.shape[1:]
    side = max(width, height)
    if _too_large(side, width, height):
        thin = view.size if width == side else width, view.size if height == side else height
        thick = side if width < side else view.size, side if height < side else view.size
        return _resize(_resize(pixels, thin, view.resample), thick, view.resample)
    return _resize(pixels, (side, side), view.resample)


class PillowDecoder:
    """Decoder of single images into views."""

    def __init__(self, views: Views, rng: CounterRNG):
        self.views, self.rng = views, rng

    def __call__(self, data: bytes, sample_id: int) -> tuple[Tensor | None, Tensor | None]:
        """Decode into (gen, und), uint8 [3, H, W] each. Raises BadImage."""
        return make_views(pixels_of(open_rgb(data)), self.views, crop_position(self.views, self.rng, sample_id))


def make_views(pixels: Tensor, views: Views, crop: float) -> tuple[Tensor | None, Tensor | None]:
    """Return the views (gen, und) of an image, uint8 [3, H, W] each."""
    gen, und = (None if view is None else make_view(pixels, view, crop) for view in (views.gen, views.und))
    return gen, und


def crop_position(views: Views, rng: CounterRNG, sample_id: int) -> float:
    """Draw the position of a sample's random crop, the same for both views; 0.5 without one."""
    if not any(view and view.fit == "random_crop" for view in (views.gen, views.und)):
        return 0.5
    return float(rng.uniform(RandomStream.CROP, torch.tensor([sample_id])))
