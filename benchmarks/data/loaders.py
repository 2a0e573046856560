"""Loaders from JPEG files to the two views of every image: uint8 [3, S, S], one process and thread, batches of BATCH.

Third-party loaders are called as in their documentation. All resize the whole image, bicubic with antialiasing.
"""

import contextlib
import importlib
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import OURS
from reca.data.config import DataConfig
from reca.data.dali import DaliDecoder, available
from reca.data.loader import open_loader
from reca.data.transforms import PillowDecoder
from reca.data.views import View, Views
from reca.rng import CounterRNG

BATCH = 16
Batches = Iterator[tuple[list[Tensor] | Tensor, list[Tensor] | Tensor]]


class Way(NamedTuple):
    """A loader. run: yields all batches of (gen, und) once, in the order of the files if `in_order`."""

    run: Callable[[], Batches]
    in_order: bool = True


def ways(folder: Path, files: list[bytes], gen: int, und: int, device: str) -> dict[str, Way | str]:
    """Return the loaders by name, or a string that says why one cannot run here."""
    views = Views(View(gen), View(und))
    found: dict[str, Way | str] = {
        f"{OURS}: Pillow": Way(lambda: _decoded(PillowDecoder(views, CounterRNG(0)), files)),
        f"{OURS}: loader": Way(lambda: _loader(folder, views, len(files)), in_order=False),
    }
    for where in ("cpu", "gpu"):
        name = f"{OURS}: DALI {where.upper()}"
        if not available():
            found[name] = "not installed (nvidia-dali-cuda130)"
        elif where == "gpu" and device != "cuda":
            found[name] = "needs a GPU"
        else:
            decoder = DaliDecoder(views, CounterRNG(0), 1, where)
            found[name] = Way(lambda decoder=decoder: _batched(decoder, files))
    others = {
        "Pillow": ("PIL", lambda module: lambda: _pillow(files, gen, und)),
        "torchvision ImageFolder": ("torchvision", lambda module: lambda: _image_folder(folder, gen, und)),
        "torchvision decode_jpeg": ("torchvision", lambda module: lambda: _decode_jpeg(files, gen, und)),
        "webdataset": ("webdataset", lambda module: lambda: _webdataset(folder, gen, und)),
        "DALI CPU, its own resizing": ("nvidia.dali", lambda module: lambda: _dali(files, gen, und, "cpu")),
        "DALI GPU, its own resizing": ("nvidia.dali", lambda module: lambda: _dali(files, gen, und, "gpu")),
    }
    for name, (module, make) in others.items():
        try:
            found[name] = Way(make(importlib.import_module(module)))
        except Exception as error:  # a package built for another torch may raise anything
            found[name] = f"not importable: {type(error).__name__}: {str(error).splitlines()[0]}"
    if device != "cuda":
        found["DALI GPU, its own resizing"] = "needs a GPU"
    return found


def _chunks(files: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(files), BATCH):
        yield files[start : start + BATCH]


def _decoded(decoder: PillowDecoder, files: list[bytes]) -> Batches:
    for chunk in _chunks(files):
        pairs = [decoder(file, 0) for file in chunk]
        yield [gen for gen, _ in pairs], [und for _, und in pairs]


def _batched(decoder: DaliDecoder, files: list[bytes]) -> Batches:
    for chunk in _chunks(files):
        pairs = decoder.batch(chunk, range(len(chunk)))
        yield [gen for gen, _ in pairs], [und for _, und in pairs]


def _loader(folder: Path, views: Views, count: int) -> Batches:
    """Yield the batches of a training run, which includes reading files, drawing templates and collating."""
    config = DataConfig(images=str(folder / "images"), decoder="pillow", workers=0)
    loader = open_loader(config, "reca", views, seed=0, micro_batch=BATCH)
    for batch in itertools.islice(loader, count // BATCH):
        yield batch.gen, batch.und


def _pillow(files: list[bytes], gen: int, und: int) -> Batches:
    from PIL import Image

    def view(image: Image.Image, side: int) -> Tensor:
        resized = image.resize((side, side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    for chunk in _chunks(files):
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in chunk]
        yield [view(image, gen) for image in images], [view(image, und) for image in images]


def _image_folder(folder: Path, gen: int, und: int) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    loader = DataLoader(ImageFolder(str(folder / "images"), _two_views(gen, und)), BATCH, num_workers=0)
    for (first, second), _ in loader:
        yield first, second


def _two_views(gen: int, und: int) -> Callable:
    from torchvision.transforms import Compose, InterpolationMode, PILToTensor, Resize

    def view(side: int) -> Callable:
        return Compose([Resize((side, side), InterpolationMode.BICUBIC), PILToTensor()])

    first, second = view(gen), view(und)
    return lambda image: (first(image), second(image))


def _decode_jpeg(files: list[bytes], gen: int, und: int) -> Batches:
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    def view(image: Tensor, side: int) -> Tensor:
        return resize(image, [side, side], InterpolationMode.BICUBIC, antialias=True)

    for chunk in _chunks(files):
        images = [
            decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB) for file in chunk
        ]
        yield [view(image, gen) for image in images], [view(image, und) for image in images]


def _webdataset(folder: Path, gen: int, und: int) -> Batches:
    import webdataset

    views = _two_views(gen, und)
    dataset = webdataset.WebDataset(str(folder / "images.tar"), shardshuffle=False).decode("pil").to_tuple("jpg")
    dataset = dataset.map(lambda sample: views(sample[0])).batched(BATCH)
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=0)


def _dali(files: list[bytes], gen: int, und: int, device: str) -> Batches:
    import nvidia.dali.experimental.dynamic as dynamic
    from nvidia.dali import types

    with _dali_context(dynamic), dynamic.EvalMode.sync_full:
        for chunk in _chunks(files):
            encoded = dynamic.as_batch([np.frombuffer(file, np.uint8) for file in chunk])
            images = dynamic.decoders.image(encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)
            views = []
            for side in (gen, und):
                resized = dynamic.resize(images, size=[float(side)] * 2, interp_type=types.INTERP_CUBIC, antialias=True)
                views.append([torch.from_dlpack(image).permute(2, 0, 1).contiguous() for image in resized.tensors])
            yield views[0], views[1]


_contexts: list = []


def _dali_context(dynamic) -> contextlib.AbstractContextManager:
    """Return a single context with one thread: creating its threads takes longer than a batch."""
    if not _contexts:
        _contexts.append(dynamic.EvalContext(num_threads=1))
    return _contexts[0]
