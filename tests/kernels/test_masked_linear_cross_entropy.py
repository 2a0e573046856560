"""Masked cross-entropy of a linear head against fp64; edge cases; system behaviour."""

import pytest
import torch

from reca_kernels import masked_linear_cross_entropy
from reca_kernels.reference import masked_linear_cross_entropy as reference
from tests.kernels.backends import targets
from tests.kernels.cross_entropy import DTYPES, IGNORED, OPTIONS, close, exact, gradients, problem

OP = "masked_linear_cross_entropy"
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), targets(OP))
KERNELS = pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [3, 4096])
@EVERYWHERE
def test_loss_and_gradients(backend, device, chunk_rows, dtype, options, reduction):
    leaves, labels = problem(dtype=dtype, device=device)
    wide = exact(leaves)
    loss = masked_linear_cross_entropy(
        leaves[0], leaves[1], labels, leaves[2], reduction=reduction, chunk_rows=chunk_rows, backend=backend, **options
    )
    want = reference.masked_linear_cross_entropy(wide[0], wide[1], labels, wide[2], reduction=reduction, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3
    close(loss.detach(), want.detach(), tolerance)
    for got, true in zip(gradients(loss, leaves), gradients(want, wide), strict=True):
        assert got.dtype == dtype
        close(got, true, tolerance)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@KERNELS  # the definition multiplies every row
def test_rows_without_label_are_not_read(backend, device, poison):
    leaves, labels = problem(device=device)
    hidden = leaves[0].detach().clone()
    hidden[labels == IGNORED] = poison
    hidden.requires_grad_()
    loss = masked_linear_cross_entropy(hidden, leaves[1], labels, backend=backend)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, leaves[1])))


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@EVERYWHERE
def test_no_labels_at_all(backend, device, reduction, rows):
    leaves, labels = problem(rows=rows, labelled=0.0, device=device)
    loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], reduction=reduction, backend=backend)
    assert loss.shape == ((rows,) if reduction == "none" else ()) and not loss.any()
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), leaves))


@EVERYWHERE
def test_layouts(backend, device):
    """Transposed weight, a slice of a larger hidden state, int32 labels."""
    leaves, labels = problem(device=device)
    hidden, weight = leaves[0].detach(), leaves[1].detach()
    wide = torch.cat((hidden, hidden), 1)
    want = masked_linear_cross_entropy(hidden, weight, labels, backend=backend)
    got = masked_linear_cross_entropy(
        wide[:, : hidden.shape[1]], weight.T.contiguous().T, labels.int(), backend=backend
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("label", [-1, 77, -101])
def test_label_out_of_range(label):
    leaves, labels = problem()
    labels[4] = label
    with pytest.raises(ValueError, match=f"label {label} in row 4 is outside"):
        masked_linear_cross_entropy(*leaves[:2], labels)


def test_shapes_and_dtypes_that_do_not_fit():
    leaves, labels = problem()
    for bad, error, words in (
        (lambda: masked_linear_cross_entropy(leaves[0], leaves[1][:0], labels), ValueError, "FSDP or ZeRO-3"),
        (lambda: masked_linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2][1:]), ValueError, "bias must be"),
        (lambda: masked_linear_cross_entropy(*leaves[:2], labels, chunk_rows=0), ValueError, "at least 1"),
    ):
        with pytest.raises(error, match=words):
            bad()


@KERNELS
def test_second_derivative_says_what_to_do(backend, device):
    leaves, labels = problem(device=device)
    loss = masked_linear_cross_entropy(*leaves[:2], labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        gradient.square().sum().backward()


@EVERYWHERE
def test_autocast_multiplies_in_its_dtype_and_keeps_the_weight_gradient(backend, device):
    leaves, labels = problem(device=device)
    with torch.autocast(device, torch.bfloat16):
        loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], backend=backend)
    rounded = masked_linear_cross_entropy(
        *(x.bfloat16() for x in leaves[:2]), labels, leaves[2].bfloat16(), backend=backend
    )
    assert loss == rounded
    assert [g.dtype for g in torch.autograd.grad(loss, leaves)] == [torch.float32] * 3


@KERNELS
def test_weight_gradient_adds_up_in_fp32_over_chunks(backend, device):
    """40 chunks of one bf16 row each: a bf16 sum is off by 8e-3; the fp32 sum, rounded once, is within one rounding."""
    leaves, labels = problem(rows=40, classes=5, width=8, labelled=1.0, dtype=torch.bfloat16, device=device)
    wide = exact(leaves)
    got = masked_linear_cross_entropy(*leaves[:2], labels, reduction="sum", chunk_rows=1, backend=backend)
    want = masked_linear_cross_entropy(*wide[:2], labels, reduction="sum", backend="reference")
    close(torch.autograd.grad(got, leaves[1])[0], torch.autograd.grad(want, wide[1])[0], 5e-3)


@KERNELS
def test_only_wanted_gradients(backend, device):
    leaves, labels = problem(device=device)
    want = torch.autograd.grad(masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], backend=backend), leaves)
    for i in range(3):
        inputs = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]
        masked_linear_cross_entropy(*inputs[:2], labels, inputs[2], backend=backend).backward()
        assert torch.equal(inputs[i].grad, want[i]) and all(x.grad is None for j, x in enumerate(inputs) if j != i)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@KERNELS
def test_compiles_into_one_graph(backend, device, reduction):
    leaves, labels = problem(device=device)

    def step(hidden, weight, bias, labels):
        return masked_linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction, backend=backend).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, labels)
    plain = step(*leaves, labels)
    torch.testing.assert_close(compiled, plain)
    for got, want in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@KERNELS
def test_registered_op(backend, device, reduction):
    leaves, labels = problem(device=device)
    torch.library.opcheck(
        torch.ops.reca.masked_linear_cross_entropy.default,
        (*leaves[:2], labels, leaves[2], IGNORED, 0.1, 1e-3, 5.0, reduction, 4, torch.float32, [True] * 3, backend),
    )
