"""Frozen encoders in TF32, which runs of bf16 multiply in on GPUs: how far features and codes move.

TF32 is emulated: operands of products keep 10 bits of mantissa, sums are fp32, as on the hardware. Weights are random.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reca.config.recipe_files import load_recipe
from reca.models import umm_package
from reca.precision import tf32_products
from tests.models.contract import batch
from tests.models.test_waits import DC_AE, FLUX, KL16, MAGVIT, SDXL, VQ

PRODUCTS = {
    F.linear, F.conv2d, torch.conv2d, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    torch.bmm, torch._C._nn.linear,
}  # fmt: skip
# Model -> the published encoders in small, which features or codes they make, and the most that these may move: the
# largest error over the root of the mean square, or the share of codes.
CASES = {
    "show_o": ({"codec": "magvitv2", "magvit": MAGVIT}, {"h_v": 5e-3, "codes": 0.01}),
    "harmon": ({"codec": "kl16", "autoencoder": KL16}, {"latents": 5e-3}),
    "open_uni": ({"codec": "dc_ae", "autoencoder": DC_AE}, {"latents": 5e-3, "h_v": 5e-3}),
    "bagel": ({"codec": "flux", "autoencoder": FLUX, "image_size": 16}, {"moments": 5e-3, "h_v": 5e-3}),
    "janus": ({"codec": "vq", "vq": VQ}, {"codes": 0.01, "h_v": 5e-3}),
    "janusflow": ({"codec": "sdxl", "autoencoder": SDXL}, {"moments": 5e-3, "h_v": 5e-3}),
}


class Rounded(TorchFunctionMode):
    """Rounds operands of products to `bits` of mantissa, to nearest even."""

    def __init__(self, bits):
        super().__init__()
        self.drop = 23 - bits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and torch.backends.cuda.matmul.allow_tf32:
            args = tuple(map(self._round, args))
        return func(*args, **(kwargs or {}))

    def _round(self, x):
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        bits = x.contiguous().view(torch.int32)
        half = (1 << (self.drop - 1)) - 1 + ((bits >> self.drop) & 1)
        return ((bits + half) >> self.drop << self.drop).view(torch.float32)


def moved(umm, bits):
    changes, _ = CASES[umm]
    model = umm_package(umm).Adapter.load(replace(load_recipe(f"{umm}_tiny").model, **changes)).eval()
    sample, found = batch(model, "reca"), {}
    exact = model.encode(sample)
    with tf32_products("bf16", torch.device("cuda")), Rounded(bits):
        rounded = model.encode(sample)
    for name, feature in exact.items():
        pairs = list(zip(feature, rounded[name], strict=True))
        if feature[0].is_floating_point():
            found[name] = float(max((a - b).abs().max() / b.square().mean().sqrt() for a, b in pairs))
        else:
            found[name] = float(torch.stack([(a != b).float().mean() for a, b in pairs]).mean())
    return found


@pytest.mark.parametrize("umm", CASES)
def test_features_move_little(umm):
    found, (_, most) = moved(umm, 10), CASES[umm]
    print(umm, found, "bf16:", moved(umm, 7))
    assert all(0 < found[name] <= limit or name == "codes" for name, limit in most.items()), found
    assert found.get("codes", 0) <= most.get("codes", 0)


def test_only_where_products_are_bf16_and_on_gpus():
    before = torch.get_float32_matmul_precision()
    for precision, device, wanted in (("bf16", "cuda", "high"), ("fp32", "cuda", before), ("bf16", "cpu", before)):
        with tf32_products(precision, torch.device(device)):
            assert torch.get_float32_matmul_precision() == wanted
        assert torch.get_float32_matmul_precision() == before
