"""resize against Pillow, to the bit: the C++ kernel on every instruction set and the definition."""

import random

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from reca_kernels import native
from reca_kernels.resize import op, reference
from reca_kernels.resize.op import resize
from reca_kernels.resize.taps import taps

CPU = torch.device("cpu")
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
needs_order = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 resizes along the rows first, always"
)


def problem(seed):
    """An image, a size, a filter and a box, or None."""
    rng = random.Random(seed)
    width, height, across, down = (rng.randint(1, 150) for _ in range(4))
    left, top = rng.uniform(0, width * 0.6), rng.uniform(0, height * 0.6)
    box = (left, top, rng.uniform(left + 0.1, width), rng.uniform(top + 0.1, height))
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 3 == 0:
        noise = noise // 128 * 255  # sharp edges: the filter leaves 0..255
    return noise, (across, down), rng.choice(list(RESAMPLE)), box if seed % 2 else None


def pillow(pixels, size, name, box):
    return torch.from_numpy(np.array(Image.fromarray(pixels).resize(size, RESAMPLE[name], box=box))).permute(2, 0, 1)


@needs_order
def test_the_kernel_has_pillows_bits(isa):
    for seed in range(48):
        noise, size, name, box = problem(seed)
        want, side_by_side = pillow(noise, size, name, box), torch.from_numpy(noise).permute(2, 0, 1)
        apart = torch.zeros(3, noise.shape[0] + 2, noise.shape[1] + 5, dtype=torch.uint8)[:, 1:-1, 2:-3]
        apart.copy_(side_by_side)
        for image in (side_by_side, side_by_side.contiguous(), apart):
            got = resize(image, size[::-1], filter=name, box=box)
            assert got.is_contiguous() and torch.equal(got, want), seed
        grey = resize(side_by_side[1:2].expand(3, -1, -1), size[::-1], filter=name, box=box)
        assert torch.equal(grey, want[1:2].expand(3, -1, -1)), seed


@needs_order
def test_the_definition_has_pillows_bits(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    for seed in range(16):
        noise, size, name, box = problem(seed)
        image = torch.from_numpy(noise).permute(2, 0, 1)
        assert torch.equal(resize(image, size[::-1], filter=name, box=box), pillow(noise, size, name, box)), seed


def test_a_photo_at_real_size():
    """1000 x 700 to 512 and to 336: more columns than fit a vector, and an odd number of rows."""
    data = pytest.importorskip("skimage.data")
    photo = np.pad(data.astronaut(), ((0, 188), (0, 488), (0, 0)), "symmetric")
    for side in (512, 336, 1024):
        want = pillow(photo, (side, side), "bicubic", (150, 0, 850, 700))
        got = resize(torch.from_numpy(photo).permute(2, 0, 1), (side, side), box=(150, 0, 850, 700))
        assert torch.equal(got, want)


def test_both_orders_of_the_definition():
    """A sum of the filter's weights is 1: a flat image stays flat, whatever comes first."""
    flat = torch.full((3, 30, 50), 137, dtype=torch.uint8)
    sides = taps(50, 3.5, 44, 17, "bicubic", CPU), taps(30, 0, 30, 61, "bicubic", CPU)
    for down_first in (False, True):
        assert torch.equal(reference.resize(flat, *sides, down_first), flat.new_full((3, 61, 17), 137))


def test_a_stream_has_weights_of_its_own(monkeypatch):
    """What is no longer kept for one stream could be written over while another one reads it."""
    sides, wanted = (40, 0, 40, 7, "bilinear", CPU), []
    assert taps(*sides, 1) is taps(*sides, 1) is not taps(*sides, 2)
    monkeypatch.setattr(op, "taps", lambda *given: wanted.append(given[6:]) or taps(*given))
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    resize(image, (4, 5))
    monkeypatch.setattr(native, "launch", lambda x: native.Launch(0, 7 * 2**40, 0))
    monkeypatch.setattr(native, "module", None)  # of the CPU's kernel
    resize(image, (4, 5))
    assert wanted == [(0,), (0,), (7 * 2**40,), (7 * 2**40,)]


@pytest.mark.parametrize("mode", ["default device", "fake", "vmap"])
def test_under_modes(mode):
    """Memory that was not the host's was written to, and fake weights were kept."""
    taps.cache_clear()
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    if mode == "default device":
        with torch.device("meta"):
            got = resize(image, (2, 3))
    elif mode == "fake":
        with FakeTensorMode() as fake:
            assert resize(fake.from_tensor(image), (2, 3)).shape == (3, 2, 3)
        got = resize(image, (2, 3))
    else:
        got = torch.func.vmap(lambda x: resize(x, (2, 3)))(image[None])[0]
    assert torch.equal(got, resize(image.clone(), (2, 3)))


def test_the_same_size_is_a_copy_of_nothing():
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    assert resize(image, (4, 5)) is image


@pytest.mark.parametrize(
    "image,options,error,said",
    [
        (torch.zeros(1, 4, 4, dtype=torch.uint8), {}, ValueError, "image must be [3, H, W], got [1, 4, 4]"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), {}, ValueError, "image must be [3, H, W], got [3, 0, 4]"),
        (torch.zeros(3, 4, 4), {}, TypeError, "image must be uint8, got torch.float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {"filter": "lanczos"}, ValueError, "unknown filter 'lanczos'"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {"size": (0, 2)}, ValueError, "at least 1 x 1, got 0 x 2"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {"box": (0, 0, 5, 4)}, ValueError, "inside the image of 4 x 4"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), {"box": (2, 0, 2, 4)}, ValueError, "must not be empty"),
    ],
)
def test_arguments_that_do_not_fit(image, options, error, said):
    with pytest.raises(error) as raised:
        resize(image, options.pop("size", (2, 2)), **options)
    assert said in str(raised.value)


@pytest.mark.gpu
@needs_order
def test_a_gpu_gives_the_same():
    for seed in range(30):
        noise, size, name, box = problem(seed)
        image = torch.from_numpy(noise).permute(2, 0, 1).cuda()
        got = resize(image, size[::-1], filter=name, box=box)
        assert got.is_cuda and torch.equal(got.cpu(), pillow(noise, size, name, box))
