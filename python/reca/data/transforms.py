"""Cropping and resizing of images to the views of an adapter. Pillow's resizing is the reference for the kernel's."""

import functools
import math

import torch
from PIL import Image
from torch import Tensor

from reca.data.pixels import MAX_PIXELS, open_rgb, pixels_of
from reca.data.views import View, Views
from reca.io.image_grid import to_pil
from reca.rng import CounterRNG, RandomStream
from reca_kernels import native
from reca_kernels.resize.op import resize

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SMALL = 2**22  # pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom


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
    if native.module is None:
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
