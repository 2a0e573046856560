"""CPU time from an image's bytes to its views, on one core of this machine."""

import io
import statistics
import time

import numpy as np
from PIL import Image

from reca.data.transforms import PillowDecoder
from reca.data.views import Views
from reca.rng import CounterRNG

SIDE, QUALITY = 1024, 90  # typical of the data of the released recipes


def jpeg(side: int = SIDE) -> bytes:
    """Return a JPEG that decodes like a photograph: noise whose amplitude falls with frequency, as in photographs."""
    noise = np.fft.rfft2(np.random.default_rng(0).standard_normal((3, side, side)))
    rows, columns = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    noise /= np.maximum(np.hypot(rows, columns), 1 / side) ** 1.4
    pixels = np.fft.irfft2(noise, (side, side))
    pixels = 127 + 50 * pixels / pixels.std()
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def seconds(views: Views, rounds: int = 5) -> float:
    """Measure the CPU seconds that PillowDecoder takes to decode and resize an image: the median of `rounds`."""
    decoder, data, times = PillowDecoder(views, CounterRNG(0)), jpeg(), []
    for number in range(1 + rounds):
        started = time.thread_time()
        decoder(data, number)
        times.append(time.thread_time() - started)
    return statistics.median(times[1:])
