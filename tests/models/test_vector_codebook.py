"""The codebook whose codes are vectors: patches come back, also from vectors near by."""

import torch

from reca.models.open_uni.config import VectorCodebookSizes
from reca.models.open_uni.modules import VectorCodebook


def test_patches_of_the_codebook_come_back_from_near_vectors():
    torch.manual_seed(0)
    codec = VectorCodebook(VectorCodebookSizes(size=4, entries=50, channels=16))
    codes = torch.randint(50, (3, 6))
    wanted = super(VectorCodebook, codec).decode(codes, (2, 3))
    latents = codec.encode(wanted)
    assert latents.shape == (3, 16, 2, 3)
    assert torch.equal(latents[1, :, 1, 2], codec.vectors[codes[1, 5]])
    assert torch.equal(codec.decode(latents + 0.2 * torch.randn_like(latents)), wanted)
    assert not torch.equal(codec.decode(-latents), wanted)
