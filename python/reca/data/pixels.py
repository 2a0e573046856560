"""Decode image bytes into the views of an adapter. Pillow's decoder is the definition; DALI's must agree."""

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
from reca.data.metadata import without_metadata
from reca.data.views import View, Views
from reca.files import HEAD, packed, placeholder
from reca.rng import CounterRNG, RandomStream
from reca_kernels.resize.op import compiled, resize

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # of the suffixes that sources take for images
MAX_SIDE = 2**15  # an image larger than this on a side is taken for a broken header
MAX_PIXELS = 2**26  # 8192 x 8192, which take 0.8 GB while they are decoded and made RGB
MAX_PIXELS_WEBP = 2**25  # whose decoder keeps three images
MAX_PIXELS_JPEG = 2**27  # 16384 x 8192: above MAX_PIXELS they are decoded at half the size, at most 0.9 GB
SMALL = 2**22  # pixels
STRIP = 2**22  # pixels that are converted at a time
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow's coding of grey in a PNG -> what one step is in 8 bits
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
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


# Between Pillow's limit and MAX_PIXELS_JPEG.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BadImage(BadSample):
    """Bytes that are no readable image; the message says why."""


def open_rgb(data: bytes) -> Image.Image:
    """Decode an image as RGB, upright, transparency on white, of 16 bits the upper 8. Raises BadImage.

    A JPEG of more than MAX_PIXELS has half its width and height.
    """
    return _with_or_without_metadata(_open_rgb, data)


def shown_size(data: bytes) -> tuple[int, int]:
    """Read width and height of an image as it is shown, upright. Raises BadImage."""
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
            file.load()  # turns it upright; its size may be turned before that
        width, height = file.size
        return (height, width) if orientation(file) in SIDEWAYS else (width, height)


def _open_rgb(data: bytes) -> Image.Image:
    with opened(data) as file:
        if file.width * file.height > MAX_PIXELS:
            file.draft(None, (file.width // 2, file.height // 2))
        _scale_transparency(file)
        file.load()
        return as_rgb(file)


def as_rgb(file: Image.Image) -> Image.Image:
    """Make an image RGB, upright, transparency on white, of 16 bits the upper 8. Raises BadImage."""
    method = TRANSPOSE.get(orientation(file))
    image = file if method is None else file.transpose(method)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, file)
    return _flatten(image)


def _scale_transparency(file: ImageFile.ImageFile) -> None:
    """Bring the transparent colour of a PNG to the 8 bits of the pixels that it is compared with.

    Pillow leaves it as it stands in the file: in 2, 4 or 16 bits. Of 16 bits the upper 8 are left of either.
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
    """Open an image file and check its header. Raises BadImage, also for what goes wrong inside of the context."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            limit = _most_pixels(file)
            if max(file.size) > MAX_SIDE or file.width * file.height > limit:
                raise BadImage(
                    f"{file.width} x {file.height} pixels; at most {MAX_SIDE} on a side and {limit} in all are read"
                )
            yield file
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        cause = placeholder(data[:HEAD]) or packed(data[:HEAD])
        raise BadImage(
            f"the file {cause}" if cause else f"no image in a format that is read ({', '.join(FORMATS)})"
        ) from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken bytes
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _most_pixels(file: Image.Image) -> int:
    """Return the pixel limit of the file's format."""
    if file.format == "WEBP":
        return MAX_PIXELS_WEBP
    if file.format in ("JPEG", "MPO") and file.mode in ("RGB", "L"):
        return MAX_PIXELS_JPEG
    return MAX_PIXELS


def orientation(image: Image.Image) -> int:
    """Read the EXIF orientation; 1 (upright) where it is missing or garbled."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds for garbled EXIF
        return 1


def _eight_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits by its mode, never by its values: all images are scaled alike.

    Raises BadImage where the format does not say what white is.
    """
    # Older Pillow opens a PNG of 16 bits in mode "I".
    if not image.mode.startswith("I;16") and not (image.mode == "I" and file.format == "PNG"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise BadImage(f"pixels are {kind}, which have no fixed white: save it with 8 or 16 bits")
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
    """Convert to RGB, transparency on white. In strips, so that no second copy of the whole image is held."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    whole, rows = Image.new("RGB", image.size), max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if image.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        whole.paste(strip.convert("RGB"), (0, top))
    return whole


def read_image(path: Path) -> Tensor:
    """Read an image file: uint8 [3, H, W]. Raises DataError."""
    if not path.is_file():
        raise DataError(f"image {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        return pixels_of(open_rgb(path.read_bytes())).contiguous()
    except BadImage as error:
        raise DataError(f"{path} is no readable image: {error}") from error


def bound_size(width: int, height: int, view: View) -> tuple[int, int]:
    """Compute (width, height) of fit "bound": see View. The rounding is BAGEL's, including its area rule."""

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
    if view.fit == "letterbox":  # what stands on the square; Janus' own rounding
        across, down = (max(int(side / max(width, height) * view.size), view.min_size, 1) for side in (width, height))
        return whole, (across, down)
    if view.fit == "bound":
        return whole, bound_size(width, height, view)
    if view.fit in ("center_crop", "clip_crop"):  # resize the short side, then cut whole pixels from the middle
        w, h = (int(view.size * side / short) for side in (width, height))  # rounded down in either
        whole_pixels = round if view.fit == "center_crop" else int
        left, top = (whole_pixels((side - view.size) / 2) for side in (w, h))
        box = (left / w * width, top / h * height, (left + view.size) / w * width, (top + view.size) / h * height)
        return box, (view.size, view.size)
    raise ValueError(f"unknown fit {view.fit!r}; expected squash, stretch, center_crop, clip_crop, random_crop, "
                     "pad, letterbox or bound")  # fmt: skip


def make_view(image: Image.Image | Tensor, view: View, crop: float = 0.5) -> Tensor:
    """Crop and resize an image to a view: uint8 [3, H, W], where the image is. A tensor is uint8 [3, H, W], too.

    crop: in [0, 1), where along the longer side a random crop lies.
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
    """Return an RGB image as uint8 [3, H, W], the channels of a pixel side by side."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encode_png(pixels: Tensor) -> bytes:
    """Encode an image, uint8 [3, H, W], as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return file.getvalue()


Box = tuple[float, float, float, float]


def _resize(pixels: Tensor, size: tuple[int, int], resample: str, box: Box | None = None) -> Tensor:
    """Resize to (width, height) as Pillow does, to the bit: by Pillow itself where the kernel would give others."""
    if pixels.is_cuda or _resizes_as_pillow():
        return resize(pixels, size[::-1], filter=resample, box=box)
    return pixels_of(_by_pillow(pixels, size, resample, box)).contiguous()


def _by_pillow(pixels: Tensor, size: tuple[int, int], resample: str, box: Box | None = None) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image.resize(size, RESAMPLE[resample], box=box)


@functools.cache
def _resizes_as_pillow() -> bool:
    """Return whether the C++ kernel is there and gives the bits of the Pillow that is installed.

    Before version 13 Pillow resized along the rows first, always.
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
    """Cut a square of the short side, so that nothing beside it reaches its border when it is resized."""
    short = min(pixels.shape[1:])
    top, left = (int(crop * (side - short + 1)) for side in pixels.shape[1:])
    return pixels[:, top : top + short, left : left + short]


def _too_large(side: int, width: int, height: int) -> bool:
    """Return whether a square is much larger than its image, as it is for a thin one."""
    return side**2 > max(SMALL, min(4 * width * height, MAX_PIXELS))


def _pad(pixels: Tensor, view: View) -> Tensor:
    """Pad the image to a square of its long side.

    Where that square is too large, the image is resized first, as it would be inside of it.
    """
    height, width = pixels.shape[1:]
    side = max(width, height)
    if _too_large(side, width, height):
        inner = max(1, round(width * view.size / side)), max(1, round(height * view.size / side))
        pixels, side = _resize(pixels, inner, view.resample), view.size
    return _centred(pixels, side, view.fill)


def _centred(pixels: Tensor, side: int, fill: int) -> Tensor:
    """Put the image into the middle of a square."""
    height, width = pixels.shape[1:]
    left, top = (side - width) // 2, (side - height) // 2
    square = pixels.new_full((3, side, side), fill)
    square[:, top : top + height, left : left + width] = pixels
    return square


def _stretch(pixels: Tensor, view: View) -> Tensor:
    """Resize the image to a square of its long side.

    Where that square is too large, the long side shrinks to the view's before the short one grows: the two filters
    commute, up to the rounding in between.
    """
    height, width = pixels.shape[1:]
    side = max(width, height)
    if _too_large(side, width, height):
        thin = view.size if width == side else width, view.size if height == side else height
        thick = side if width < side else view.size, side if height < side else view.size
        return _resize(_resize(pixels, thin, view.resample), thick, view.resample)
    return _resize(pixels, (side, side), view.resample)


class PillowDecoder:
    """Decodes single images into views."""

    def __init__(self, views: Views, rng: CounterRNG):
        self.views, self.rng = views, rng

    def __call__(self, data: bytes, sample_id: int) -> tuple[Tensor | None, Tensor | None]:
        """Decode into (gen, und), uint8 [3, H, W] each. Raises BadImage."""
        return make_views(pixels_of(open_rgb(data)), self.views, crop_position(self.views, self.rng, sample_id))


def make_views(pixels: Tensor, views: Views, crop: float) -> tuple[Tensor | None, Tensor | None]:
    """Make (gen, und) of an image, uint8 [3, H, W] each."""
    gen, und = (None if view is None else make_view(pixels, view, crop) for view in (views.gen, views.und))
    return gen, und


def crop_position(views: Views, rng: CounterRNG, sample_id: int) -> float:
    """Draw where a sample is cropped, the same for both views."""
    if not any(view and view.fit == "random_crop" for view in (views.gen, views.und)):
        return 0.5
    return float(rng.uniform(RandomStream.CROP, torch.tensor([sample_id])))
