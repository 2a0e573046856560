"""The linear codec of toy images."""

import pytest
import torch

from reca.models.common.patch_codec import PatchCodec
from reca.toy_datasets.shapes.detector import shows
from reca.toy_datasets.shapes.splits import understood


def pixels(n):
    split = understood(0)
    return split, torch.stack([split.image(i) for i in range(n)]).float() / 127.5 - 1


def test_all_channels_lose_nothing():
    codec, x = PatchCodec(4, 48), torch.rand(2, 3, 8, 20) * 2 - 1
    codec.fit(torch.rand(50, 3, 20, 20) * 2 - 1)
    z = codec.encode(x)
    assert z.shape == (2, 48, 2, 5)
    torch.testing.assert_close(codec.decode(z), x, rtol=0, atol=1e-4)


def test_a_random_codec_projects():
    codec, x = PatchCodec(4, 16), torch.rand(2, 3, 8, 20)
    once = codec.decode(codec.encode(x))
    torch.testing.assert_close(codec.decode(codec.encode(once)), once)


def test_it_is_exact_under_autocast():
    codec, x = PatchCodec(4, 16), torch.rand(2, 3, 8, 20)
    z = codec.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = codec.encode(x), codec.decode(z)
    assert torch.equal(found[0], z) and torch.equal(found[1], codec.decode(z))


def test_toy_images_survive_sixteen_channels():
    split, x = pixels(600)
    codec = PatchCodec(4, 16)
    codec.fit(x)
    z = codec.encode(x)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.05)
    drawn = ((codec.decode(z[:100]) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert sum(shows(image, split.scene(i), True, True) for i, image in enumerate(drawn)) >= 98


@pytest.mark.parametrize("channels", [0, 49])
def test_channels_that_do_not_fit(channels):
    with pytest.raises(ValueError, match=f"1 to 48 latent channels, not {channels}"):
        PatchCodec(4, channels)
