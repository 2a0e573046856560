"""A loss scale multiplies gradients before fp16 cuts their small digits off: a loss that makes them early must wait.

Errors are those of gradients as the optimizer gets them, scale taken off, against fp64; the yardstick is what PyTorch's
own operations lose with the same fp16 tensors and the same scale.
"""

import pytest
import torch
from torch.nn import functional as F

from reca_kernels import (
    Philox,
    diffusion_loss,
    diffusion_schedule,
    flow_matching_loss,
    masked_cross_entropy,
    masked_linear_cross_entropy,
    native,
)
from reca_kernels.diffusion_loss import reference as diffusion
from reca_kernels.masked_linear_cross_entropy.linear_chunks import fp16_unit
from reca_kernels.philox.reference import philox_normal
from tests.kernels.backends import targets

# numpy's, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SCALE = 65536.0
ROUNDING = 2.0**-11  # to fp16, once
SHOW_O = 58498


def gradients(loss_of, tensors, scale=SCALE):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return [g.double() / scale for g in torch.autograd.grad(loss_of(*leaves) * scale, leaves)]


def error(got, true):
    return float((got - true).norm() / true.norm())


def as_good_as_eager(ours, eager, truth):
    for got, plain, true in zip(ours, eager, truth, strict=True):
        assert error(got, true) <= max(2 * error(plain, true), ROUNDING), (error(got, true), error(plain, true))


def head(rows, classes, width, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator) * 0.05
    weight = torch.randn(classes, width, generator=generator) * 0.02
    bias = torch.randn(classes, generator=generator) * 0.02
    labels = torch.randint(classes, (rows,), generator=generator)
    return [x.half().to(device) for x in (hidden, weight, bias)], labels.to(device)


def eager_head(labels, reduction="mean", **options):
    return lambda h, w, b: F.cross_entropy(F.linear(h, w, b).float(), labels, reduction=reduction, **options)


def check_head(backend, device, rows, classes, width, scale=SCALE, **options):
    tensors, labels = head(rows, classes, width, device)
    truth = gradients(eager_head(labels), [x.double() for x in tensors])
    eager = gradients(eager_head(labels), tensors, scale)
    ours = gradients(
        lambda h, w, b: masked_linear_cross_entropy(h, w, labels, b, backend=backend, **options), tensors, scale
    )
    as_good_as_eager(ours, eager, truth)
    free = torch.ones(classes, dtype=torch.bool)
    free[labels.cpu()] = False  # classes whose only gradient is their small probability
    as_good_as_eager([ours[1].cpu()[free]], [eager[1].cpu()[free]], [truth[1].cpu()[free]])


@pytest.mark.parametrize(("backend", "device"), targets("masked_linear_cross_entropy"))
def test_a_head_of_show_o(backend, device):
    """Divided by 8 rows and not yet by the scale, a probability of 1 / 58498 has 5 bits left in fp16."""
    check_head(backend, device, rows=8, classes=SHOW_O, width=16)


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_a_batch_of_show_o():
    """Divided by 512 rows, a probability is half of the least number above 0."""
    check_head("cpu", "cpu", rows=512, classes=SHOW_O, width=4)


@pytest.mark.parametrize("chunk_rows", [3, 4096])
@pytest.mark.parametrize(("backend", "device"), targets("masked_linear_cross_entropy"))
def test_chunks_and_other_scales(backend, device, chunk_rows):
    for scale in (1.0, 1024.0):
        check_head(backend, device, rows=10, classes=4096, width=16, scale=scale, chunk_rows=chunk_rows)


@pytest.mark.parametrize(("backend", "device"), targets("masked_linear_cross_entropy"))
def test_sum_over_rows_of_the_head(backend, device):
    tensors, labels = head(6, 512, 16, device)
    scale = SCALE / 64  # the sum of six rows times 65536 is above what fp16 holds

    def ours(h, w, b):
        return masked_linear_cross_entropy(h, w, labels, b, reduction="sum", backend=backend)

    truth = gradients(eager_head(labels, "sum"), [x.double() for x in tensors], scale)
    as_good_as_eager(gradients(ours, tensors, scale), gradients(eager_head(labels, "sum"), tensors, scale), truth)


@pytest.mark.parametrize(("backend", "device"), targets("masked_linear_cross_entropy", reference=False))
def test_no_gradient_overflows_before_the_scale_is_known(backend, device):
    """A certain and wrong prediction with a large z_loss: |p - y| is 1, times 1 + 2 z_loss log_sum_exp."""
    hidden = torch.full((2, 8), 4.0, dtype=torch.float16, device=device)
    weight = torch.zeros(40, 8, dtype=torch.float16, device=device)
    weight[3] = 3.0
    labels = torch.tensor([5, 3], device=device)
    for z_loss in (0.0, 1e-4, 0.1, 1.0):
        options = {"z_loss": z_loss, "backend": backend}
        got = gradients(lambda h, w: masked_linear_cross_entropy(h, w, labels, **options), (hidden, weight), 1.0)  # noqa: B023
        wide = [x.double() for x in (hidden, weight)]
        want = gradients(
            lambda h, w: masked_linear_cross_entropy(h, w, labels, z_loss=z_loss, backend="reference"),  # noqa: B023
            wide,
            1.0,
        )
        for g, true in zip(got, want, strict=True):
            assert error(g, true) < 2e-3
    assert fp16_unit(torch.float16, 0.0) == 2**15 and fp16_unit(torch.float32, 0.0) is None


@pytest.mark.parametrize(("backend", "device"), targets("masked_linear_cross_entropy"))
def test_autocast_of_fp32_parameters(backend, device):
    """Their gradients are fp32: what fp16 logits lose is all there is to lose."""
    tensors, labels = head(8, 4096, 16, device)
    tensors = [x.float() for x in tensors]

    def under_autocast(loss_of):
        def run(*leaves):
            with torch.autocast(device, torch.float16):
                return loss_of(*leaves)

        return run

    truth = gradients(eager_head(labels), [x.double() for x in tensors])
    ours = under_autocast(lambda h, w, b: masked_linear_cross_entropy(h, w, labels, b, backend=backend))
    as_good_as_eager(gradients(ours, tensors), gradients(under_autocast(eager_head(labels)), tensors), truth)


@pytest.mark.parametrize(("backend", "device"), targets("masked_cross_entropy"))
def test_logits(backend, device):
    """Made in the backward pass, where the scale is known."""
    logits = torch.randn(8, 4096, generator=torch.Generator().manual_seed(1)).half().to(device)
    labels = torch.arange(8, device=device) * 37
    truth = gradients(lambda z: F.cross_entropy(z, labels), [logits.double()])
    eager = gradients(lambda z: F.cross_entropy(z.float(), labels), [logits])
    as_good_as_eager(gradients(lambda z: masked_cross_entropy(z, labels, backend=backend), [logits]), eager, truth)


@pytest.mark.parametrize("distance", [1e-5, 0.1, 4e4], ids=["close", "usual", "far"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("backend", "device"), targets("flow_matching"))
def test_velocities(backend, device, weighted, distance):
    """2 (pred - target) is below what fp16 resolves, or above what it holds, until it is divided and scaled."""
    generator = torch.Generator().manual_seed(2)
    pred = (torch.randn(2, 4, 8, 8, generator=generator) * 1e-3).half()
    noise = torch.zeros(2, 4, 8, 8)
    x0 = distance * torch.randn(pred.shape, generator=generator) - pred.float()  # the target is -x0
    weight = torch.tensor([1.0, 0.25]) if weighted else None
    pred, x0, noise, t = (x.to(device) for x in (pred, x0, noise, torch.rand(2)))
    weight = None if weight is None else weight.to(device)
    scale = SCALE if distance < 1 else 1e-2

    def eager(p):
        each = (p.to(torch.promote_types(p.dtype, torch.float32)) + x0).square()
        return (each if weight is None else each * weight[:, None, None, None]).mean()

    ours = gradients(lambda p: flow_matching_loss(p, x0, t, noise, weight=weight, backend=backend), [pred], scale)
    as_good_as_eager(ours, gradients(eager, [pred], scale), gradients(eager, [pred.double()]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "device"), targets("diffusion_loss"))
def test_noise_predictions(backend, device, reduction):
    generator = torch.Generator().manual_seed(3)
    x0, t = torch.randn(4, 8, generator=generator), torch.tensor([3, 200, 900, 500])
    address = Philox(torch.tensor(5), torch.arange(4), 1)
    noise = philox_normal(*address, 8)
    table = diffusion_schedule()
    out = torch.cat((noise + 1e-5 * torch.randn(4, 8, generator=generator), torch.full((4, 8), -1.0)), 1).half()
    # What is right to fp16: the rounded prediction is off by more than the rest, so the noise is moved to it.
    noise = out[:, :8].float() + 1e-5 * torch.randn(4, 8, generator=generator)

    def eager(o):
        return diffusion.losses(o, x0, t, noise, table, None).mean()

    def ours(o):
        loss = diffusion_loss(o, *(x.to(device) for x in (x0, t, noise, table)), reduction=reduction, backend=backend)
        return loss.mean().cpu()

    got = gradients(ours, [out.to(device)])
    truth = gradients(
        lambda o: diffusion.losses(o, x0.double(), t, noise.double(), table.double(), None).mean(), [out.double()]
    )
    as_good_as_eager([got[0].cpu()], gradients(eager, [out]), truth)
