"""Views by NVIDIA DALI: nvJPEG decodes a whole batch on the GPU, and its views are made there and stay there.

DALI decodes only. The views are resized by this package's kernel, with Pillow's bits: DALI's own resizing, bicubic and
bilinear, differs from Pillow's by up to 13 grey levels (docs/log.md). Files that DALI decodes differently from Pillow
(anything but plain JPEG: alpha, palettes, 16 bits, CMYK, GIF, …) go through Pillow, and so does what DALI fails at, so
whether an image is bad is Pillow's to say.
"""

import contextlib
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reca.data.metadata import JPEG, JPEG_SCAN
from reca.data.pixels import (
    MAX_PIXELS,
    BadImage,
    PillowDecoder,
    crop_position,
    make_views,
    opened,
    orientation,
)
from reca.data.views import Views
from reca.rng import CounterRNG

log = logging.getLogger("reca")

MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of JPEG; in a scan other bytes than these follow 0xFF
END, TABLES, PROGRESSIVE = 0xD9, 0xC4, 0xC2

Pair = tuple[Tensor | None, Tensor | None]


def available() -> bool:
    """Return whether DALI's dynamic mode can be imported."""
    try:
        import nvidia.dali.experimental.dynamic  # noqa: F401
    except ImportError:
        return False
    return True


class DaliDecoder:
    """Decodes as PillowDecoder does, a batch at a time.

    On device "cpu" the views have Pillow's bits where DALI's libjpeg-turbo is Pillow's. On "gpu" nvJPEG's inverse
    transform rounds differently.
    """

    def __init__(self, views: Views, rng: CounterRNG, threads: int = 1, device: str | None = None):
        """threads: of DALI. device: "gpu", this process's current one, or "cpu"; default: "gpu" where there is one."""
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import types

        self.views, self.rng, self.dynamic, self.types = views, rng, dynamic, types
        self.device = device or ("gpu" if torch.cuda.is_available() else "cpu")
        # A new thread's current device is the first one, whatever this process's is.
        self.index = torch.cuda.current_device() if self.device == "gpu" else None
        self.stream = torch.cuda.Stream(self.index) if self.device == "gpu" else None
        self.context = dynamic.EvalContext(num_threads=threads, device_id=self.index, cuda_stream=self.stream)
        self.lock = threading.Lock()  # a context is of one thread at a time, and so is the memory of one batch
        self.pillow = PillowDecoder(views, rng)
        self.refused: set[int] = set()  # hashes of the files that DALI failed at

    def takes(self, data: bytes) -> bool:
        """Return whether these bytes are for `batch`: a whole, upright JPEG, RGB or grey, that has not failed."""
        return _one_image(data) and _plain_jpeg(data) and hash(data) not in self.refused

    def __call__(self, data: bytes, sample_id: int) -> Pair:
        """Decode one file into (gen, und), uint8 [3, H, W] each. Raises BadImage."""
        if not self.takes(data):
            return self.pillow(data, sample_id)
        (found,) = self.batch([data], [sample_id])
        if isinstance(found, BadImage):
            raise found
        return found

    def batch(self, files: Sequence[bytes], sample_ids: Sequence[int]) -> list[Pair | BadImage]:
        """Decode files into (gen, und) each, uint8 [3, H, W], where the decoder works; a BadImage for a bad one."""
        with self.lock, self._working():
            return self._batch(list(files), list(sample_ids))

    def moved(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Copy what Pillow has decoded to where `batch` leaves its views."""
        if self.stream is None or all(view.is_cuda for view in views):
            return list(views)
        with self.lock, self._working():
            return [view.to(self.stream.device) for view in views]

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Work on the stream. All of its work is done at the end: DALI's memory may be used again then."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.index), torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()

    def _batch(self, files: list[bytes], sample_ids: list[int]) -> list[Pair | BadImage]:
        if not files:
            return []
        try:
            images = self._decoded(files)
        except Exception as error:  # of many kinds, and none that says which file it was
            if len(files) > 1:
                half = len(files) // 2
                return self._batch(files[:half], sample_ids[:half]) + self._batch(files[half:], sample_ids[half:])
            return [self._by_pillow(files[0], sample_ids[0], error)]
        crops = [crop_position(self.views, self.rng, sample_id) for sample_id in sample_ids]
        return [make_views(image, self.views, crop) for image, crop in zip(images, crops, strict=True)]

    def _decoded(self, files: list[bytes]) -> list[Tensor]:
        """Decode into images, uint8 [3, H, W], in memory of DALI's. Raises what DALI raises."""
        with self.context, self.dynamic.EvalMode.sync_full:
            images: Any = self.dynamic.decoders.image(
                self.dynamic.as_batch([np.frombuffer(file, np.uint8) for file in files]),
                device=self.device,
                output_type=self.types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # the chroma pixels that every CPU decoder gives
            )
            return [torch.from_dlpack(image).permute(2, 0, 1) for image in images.tensors]

    def _by_pillow(self, file: bytes, sample_id: int, error: Exception) -> Pair | BadImage:
        if not self.refused:
            reason = " ".join(str(error).split())[:200]
            log.warning("what DALI cannot decode goes through Pillow; the first: %s", reason)
        self.refused.add(hash(file))
        try:
            return self.pillow(file, sample_id)
        except BadImage as bad:
            return bad


def _one_image(data: bytes) -> bool:
    """Return whether a JPEG is one image from its first byte to its last, up to zeros behind it.

    Decoders differ in what they make of a download that broke off, of damage inside a scan, and of a second image.
    """
    place, scanned, progressive = len(JPEG), False, False
    while match := MARKER.search(data, place):
        place, kind = match.end(), data[match.end() - 1]
        if kind == END:
            return not data[place:].strip(b"\0")
        if scanned and not (progressive and kind in (TABLES, JPEG_SCAN)):
            return False
        scanned, progressive = scanned or kind == JPEG_SCAN, progressive or kind == PROGRESSIVE
        place += int.from_bytes(data[place : place + 2], "big")
    return False


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
