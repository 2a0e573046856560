"""Decoding with NVIDIA DALI: nvJPEG decodes a whole batch on the GPU, where its views are computed and stay.

DALI only decodes. This package's kernel resizes, bit-identical to Pillow: DALI's bicubic and bilinear resizing differ
from Pillow's by up to 13 grey levels (docs/log). Pillow decodes the files that DALI decodes differently (everything
but plain JPEG: alpha, palettes, 16 bits, CMYK, GIF, …) and those that DALI fails on, so Pillow alone decides whether an
image is bad.
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
from reca.data.pixels import MAX_PIXELS, BadImage, opened, orientation
from reca.data.transforms import PillowDecoder, crop_position, make_views
from reca.data.views import Views
from reca.rng import CounterRNG

log = logging.getLogger("reca")

MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # of JPEG; none of these occurs within a scan
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
    """Batched counterpart of PillowDecoder.

    On device "cpu" the views are bit-identical to Pillow's if both use the same libjpeg-turbo. On "gpu" the inverse DCT
    of nvJPEG rounds differently.
    """

    def __init__(self, views: Views, rng: CounterRNG, threads: int = 1, device: str | None = None):
        """Open a decoder with DALI threads on `device`: "gpu" (the current one) or "cpu". Default: "gpu" if any."""
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import types

        self.views, self.rng, self.dynamic, self.types = views, rng, dynamic, types
        self.device = device or ("gpu" if torch.cuda.is_available() else "cpu")
        # The current device is per thread, and a new thread starts with the first one.
        self.index = torch.cuda.current_device() if self.device == "gpu" else None
        self.stream = torch.cuda.Stream(self.index) if self.device == "gpu" else None
        self.context = dynamic.EvalContext(num_threads=threads, device_id=self.index, cuda_stream=self.stream)
        self.lock = threading.Lock()  # one thread and one batch in memory at a time
        self.pillow = PillowDecoder(views, rng)
        self.refused: set[int] = set()  # hashes of the files that DALI failed on

    def takes(self, data: bytes) -> bool:
        """Return whether `batch` decodes the file: a complete, upright RGB or grey JPEG that has not failed before."""
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
        """Decode files into (gen, und) each, uint8 [3, H, W], on the decoder's device; BadImage for a bad file."""
        with self.lock, self._working():
            return self._batch(list(files), list(sample_ids))

    def moved(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Copy views that Pillow has decoded to the device on which `batch` returns its views."""
        if self.stream is None or all(view.is_cuda for view in views):
            return list(views)
        with self.lock, self._working():
            return [view.to(self.stream.device) for view in views]

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Work on the decoder's stream, and synchronise at the end: after that DALI may reuse its memory."""
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
        except Exception as error:  # of many types, none of which tells the file
            if len(files) > 1:
                half = len(files) // 2
                return self._batch(files[:half], sample_ids[:half]) + self._batch(files[half:], sample_ids[half:])
            return [self._by_pillow(files[0], sample_ids[0], error)]
        crops = [crop_position(self.views, self.rng, sample_id) for sample_id in sample_ids]
        return [make_views(image, self.views, crop) for image, crop in zip(images, crops, strict=True)]

    def _decoded(self, files: list[bytes]) -> list[Tensor]:
        """Decode into images, uint8 [3, H, W], in memory owned by DALI. Raises DALI's exceptions."""
        with self.context, self.dynamic.EvalMode.sync_full:
            images: Any = self.dynamic.decoders.image(
                self.dynamic.as_batch([np.frombuffer(file, np.uint8) for file in files]),
                device=self.device,
                output_type=self.types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # chroma as from CPU decoders
            )
            return [torch.from_dlpack(image).permute(2, 0, 1) for image in images.tensors]

    def _by_pillow(self, file: bytes, sample_id: int, error: Exception) -> Pair | BadImage:
        if not self.refused:
            reason = " ".join(str(error).split())[:200]
            log.warning("Pillow decodes the files that DALI cannot; the first error: %s", reason)
        self.refused.add(hash(file))
        try:
            return self.pillow(file, sample_id)
        except BadImage as bad:
            return bad


def _one_image(data: bytes) -> bool:
    """Return whether a JPEG is one complete image, with nothing but zeros after it.

    Decoders differ in how they handle truncated files, damaged scans and a second image.
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
    """Return whether the bytes are an upright RGB or grey JPEG of a size that is decoded at full resolution.

    Return False for files that Pillow cannot open, so that it rejects them.
    """
    try:
        with opened(data) as header:
            small = header.width * header.height <= MAX_PIXELS
            return small and header.format == "JPEG" and header.mode in ("RGB", "L") and orientation(header) == 1
    except BadImage:
        return False
