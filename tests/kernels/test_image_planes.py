"""Planes of decoded images: the C++ kernel on every instruction set, against torch's copy."""

import ctypes
import mmap

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from reca_kernels import native
from reca_kernels.image_planes.op import arrow_planes, image_planes

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))


def noise(height, width, step):
    return torch.from_numpy(np.random.default_rng(width).integers(0, 256, (height, width, step), dtype=np.uint8))


@pytest.mark.parametrize("step", [3, 4])
def test_channels_are_split(isa, step):
    for height, width in ((1, 1), (1, 7), (5, 16), (3, 33), (64, 64), (7, 150)):
        whole = noise(height + 2, width + 3, step).permute(2, 0, 1)[:3]
        for image in (whole, whole[:, 1 : 1 + height, 2 : 2 + width]):  # the second ends in the middle of a row
            got = image_planes(image)
            assert got.is_contiguous() and torch.equal(got, image.contiguous())


@pytest.mark.parametrize("step", [3, 4])
def test_nothing_beyond_the_last_pixel_is_read(isa, step):
    """The third byte of the last pixel is the last one of its page, and the next page cannot be read."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    begin = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(begin + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0  # PROT_NONE
    page = torch.frombuffer(pages, dtype=torch.uint8)[: mmap.PAGESIZE]
    page.copy_(torch.arange(mmap.PAGESIZE))
    for width in range(1, 140):
        size = step * (width - 1) + 3
        image = page[-size:].as_strided((3, 1, width), (1, size, step))
        assert torch.equal(image_planes(image), image.contiguous())


def test_other_layouts():
    planes = noise(5, 6, 3).permute(2, 0, 1).contiguous()
    assert image_planes(planes) is planes
    for image in (planes.mT, planes[:, ::2], planes[:1].expand(3, -1, -1), noise(5, 6, 5).permute(2, 0, 1)[:3]):
        got = image_planes(image)
        assert got.is_contiguous() and torch.equal(got, image.contiguous())


def test_without_the_module(monkeypatch):
    image = noise(5, 6, 3).permute(2, 0, 1)
    monkeypatch.setattr(native, "module", None)
    assert torch.equal(image_planes(image), image.contiguous())


def test_under_modes():
    image = noise(4, 5, 3).permute(2, 0, 1)
    with torch.device("meta"):
        assert torch.equal(image_planes(image), image.contiguous())
    with FakeTensorMode() as fake:
        assert image_planes(fake.from_tensor(image)).is_contiguous()
    assert torch.equal(torch.func.vmap(image_planes)(image[None])[0], image.contiguous())


@needs_native
def test_an_image_of_pillow_is_read_in_place():
    image = Image.fromarray(noise(9, 14, 3).numpy())
    _, array = image.__arrow_c_array__()
    got = arrow_planes(array, 9, 14)
    assert torch.equal(got, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    with pytest.raises(ValueError, match="the Arrow array has 504 bytes; expected 480"):
        arrow_planes(array, 10, 12)


@needs_native
@pytest.mark.parametrize("mode", ["L", "I", "F"])
def test_arrays_of_another_form_are_refused(mode):
    _, array = Image.new(mode, (4, 4)).__arrow_c_array__()
    with pytest.raises(ValueError, match="not a list of pixels"):
        arrow_planes(array, 4, 4)
    schema = Image.new("RGB", (4, 4)).__arrow_c_schema__()
    with pytest.raises(ValueError, match="not an arrow_array"):
        arrow_planes(schema, 4, 4)
