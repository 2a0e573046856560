"""Views by NVIDIA DALI: JPEG decoding and resizing on a GPU; on a CPU the decoding only.

Files that DALI decodes differently from Pillow (anything but plain JPEG: alpha, palettes, 16 bits, CMYK, GIF, …) go
through Pillow. So does resizing on a CPU: DALI's cubic filter keeps what Pillow clips between its two passes, which
differs by up to 7 grey levels at sharp edges and is not faster there (docs/log.md).
"""

import logging

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.data.pixels import (
    MAX_PIXELS,
    BadImage,
    PillowDecoder,
    crop_position,
    geometry,
    make_view,
    opened,
    orientation,
)
from reca.data.views import View, Views
from reca.rng import CounterRNG

log = logging.getLogger("reca")


def available() -> bool:
    """Return whether DALI's dynamic mode can be imported."""
    try:
        import nvidia.dali.experimental.dynamic  # noqa: F401
    except ImportError:
        return False
    return True


class DaliDecoder:
    """Decodes as PillowDecoder does: within one grey level on device "cpu", except at sharp edges on "gpu"."""

    def __init__(self, views: Views, rng: CounterRNG, device: str | None = None):
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import types

        self.views, self.rng, self.dynamic, self.types = views, rng, dynamic, types
        self.device = device or ("gpu" if torch.cuda.is_available() else "cpu")
        self.pillow, self.failed = PillowDecoder(views, rng), False

    def __call__(self, data: bytes, sample_id: int) -> tuple[Tensor | None, Tensor | None]:
        """Decode into (gen, und), uint8 [3, H, W] each, on the CPU. Raises BadImage."""
        if not _plain_jpeg(data):
            return self.pillow(data, sample_id)
        try:
            image = self.dynamic.decoders.image(
                np.frombuffer(data, np.uint8),
                device=self.device,
                output_type=self.types.RGB,
                jpeg_fancy_upsampling=True,  # the chroma pixels that every CPU decoder gives
            )
            height, width = image.shape[:2]
        except Exception as error:  # of many kinds; whether the image is bad, Pillow says
            reason = " ".join(str(error).split())[:200]
            if not self.failed:
                self.failed = True
                log.warning("what DALI cannot decode goes through Pillow; the first: %s", reason)
            return self.pillow(data, sample_id)
        crop = crop_position(self.views, self.rng, sample_id)
        views = (self.views.gen, self.views.und)
        gen, und = (None if view is None else self._view(image, width, height, view, crop) for view in views)
        return gen, und

    def _view(self, image, width: int, height: int, view: View, crop: float) -> Tensor:
        if self.device == "cpu" or view.fit in ("pad", "stretch", "letterbox") or view.blur > 1:
            return make_view(Image.fromarray(np.asarray(image.cpu())), view, crop)
        (left, top, right, bottom), (w, h) = geometry(width, height, view, crop)
        interpolation = self.types.INTERP_CUBIC if view.resample == "bicubic" else self.types.INTERP_LINEAR
        resized = self.dynamic.resize(
            image,
            size=[h, w],
            roi_start=[float(top), float(left)],
            roi_end=[float(bottom), float(right)],
            interp_type=interpolation,
            antialias=True,
        )
        return torch.from_numpy(np.array(resized.cpu())).permute(2, 0, 1).contiguous()


def _plain_jpeg(data: bytes) -> bool:
    """Return whether the bytes are an upright JPEG of RGB or grey pixels, of a size that is decoded whole.

    What Pillow cannot open is left to it to reject.
    """
    try:
        with opened(data) as header:
            small = header.width * header.height <= MAX_PIXELS
            return small and header.format == "JPEG" and header.mode in ("RGB", "L") and orientation(header) == 1
    except BadImage:
        return False
