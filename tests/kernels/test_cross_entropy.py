"""Masked cross-entropy, of logits and of a linear head, against fp64; edge cases; system behaviour."""

import pytest
import torch

from reca_kernels import masked_cross_entropy, masked_linear_cross_entropy, native
from reca_kernels.reference import masked_cross_entropy as reference
from reca_kernels.reference import masked_linear_cross_entropy as linear_reference

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(native.module is None, reason=str(native.missing)))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0},
}
IGNORED = -100


def problem(rows=13, classes=77, width=24, labelled=0.6, dtype=torch.float32, seed=0):
    """Leaves (hidden [rows, width], weight [classes, width], bias [classes]) and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator) * 0.3
    bias = torch.randn(classes, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= labelled] = IGNORED
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], labels


def logits_of(leaves):
    hidden, weight, bias = (x.detach() for x in leaves)
    return (3 * (hidden @ weight.T + bias)).requires_grad_()


def exact(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


def gradients(loss, leaves, seed=9):
    """Gradients for an upstream gradient that is not 1."""
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))


def close(got, want, relative):
    assert float((got.double() - want.double()).norm()) <= relative * float(want.double().norm()) + 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits(backend, dtype, options, reduction):
    leaves, labels = problem(dtype=dtype)
    logits = logits_of(leaves)
    (wide,) = exact([logits])
    loss = masked_cross_entropy(logits, labels, reduction=reduction, backend=backend, **options)
    want = reference.masked_cross_entropy(wide, labels, reduction=reduction, **options)
    assert loss.dtype == torch.float32
    close(loss.detach(), want.detach(), 1e-5)
    (got,), (true,) = gradients(loss, [logits]), gradients(want, [wide])
    assert got.dtype == dtype
    close(got, true, 1e-5 if dtype == torch.float32 else 5e-3)
    assert not got[labels == IGNORED].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [3, 4096])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend, chunk_rows, dtype, options, reduction):
    leaves, labels = problem(dtype=dtype)
    wide = exact(leaves)
    loss = masked_linear_cross_entropy(
        leaves[0], leaves[1], labels, leaves[2], reduction=reduction, chunk_rows=chunk_rows, backend=backend, **options
    )
    want = linear_reference.masked_linear_cross_entropy(wide[0], wide[1], labels, wide[2], reduction=reduction, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3
    close(loss.detach(), want.detach(), tolerance)
    for got, true in zip(gradients(loss, leaves), gradients(want, wide), strict=True):
        assert got.dtype == dtype
        close(got, true, tolerance)


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 64, 4097])
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths_around_a_vector(backend, classes):
    leaves, labels = problem(classes=classes)
    logits = logits_of(leaves)
    (wide,) = exact([logits])
    loss, want = (f(x, labels) for f, x in ((lambda a, b: masked_cross_entropy(a, b, backend=backend), logits),
                                            (reference.masked_cross_entropy, wide)))  # fmt: skip
    close(loss.detach(), want.detach(), 1e-5)
    close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(want, wide)[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_common_offset_costs_no_digits(backend):
    """Logits around 1e4: log sum exp minus the label's logit, formed from the sum, would lose four digits."""
    leaves, labels = problem()
    logits = (logits_of(leaves).detach() + 8192).requires_grad_()
    (wide,) = exact([logits])
    loss = masked_cross_entropy(logits, labels, backend=backend)
    want = reference.masked_cross_entropy(wide, labels)
    close(loss.detach(), want.detach(), 1e-6)
    close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(want, wide)[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probability_minus_one_is_formed_before_rounding(backend):
    """A certain label in bf16: the gradient is p - 1 = -0.002, which p rounded to bf16 first would make 0."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    logits[0, 0] = 6.25
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(masked_cross_entropy(logits, torch.tensor([0]), backend=backend), logits)
    p = torch.sigmoid(torch.tensor(6.25, dtype=torch.float64))
    assert float(gradient[0, 0]) == pytest.approx(float(p - 1), rel=4e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_label_are_not_read(backend, poison):
    leaves, labels = problem()
    logits = logits_of(leaves).detach()
    hidden = leaves[0].detach().clone()
    logits[labels == IGNORED], hidden[labels == IGNORED] = poison, poison
    logits.requires_grad_()
    hidden.requires_grad_()
    loss = masked_cross_entropy(logits, labels, backend=backend)
    gradient = torch.autograd.grad(loss, logits)[0]
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[labels == IGNORED].any()
    if backend != "reference":  # the definition multiplies every row
        loss = masked_linear_cross_entropy(hidden, leaves[1], labels, backend=backend)
        assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, leaves[1])))


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_labels_at_all(backend, reduction, rows):
    leaves, labels = problem(rows=rows, labelled=0.0)
    logits = logits_of(leaves)
    for loss, inputs in (
        (masked_cross_entropy(logits, labels, reduction=reduction, backend=backend), [logits]),
        (masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], reduction=reduction, backend=backend), leaves),
    ):
        assert loss.shape == ((rows,) if reduction == "none" else ()) and not loss.any()
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Padded pitch, int32 labels, transposed weight, a slice of a larger hidden state."""
    leaves, labels = problem()
    logits = logits_of(leaves).detach()
    padded = torch.full((logits.shape[0], logits.shape[1] + 3), float("nan"))
    padded[:, :-3] = logits
    for view in (padded[:, :-3], logits.T.contiguous().T):
        view = view.detach().requires_grad_()
        plain = logits.clone().requires_grad_()
        loss = masked_cross_entropy(view, labels.int(), backend=backend)
        want = masked_cross_entropy(plain, labels, backend=backend)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(torch.autograd.grad(loss, view), torch.autograd.grad(want, plain))
    hidden, weight = leaves[0].detach(), leaves[1].detach()
    wide = torch.cat((hidden, hidden), 1)
    want = masked_linear_cross_entropy(hidden, weight, labels, backend=backend)
    got = masked_linear_cross_entropy(wide[:, : hidden.shape[1]], weight.T.contiguous().T, labels, backend=backend)
    torch.testing.assert_close(got, want)


def test_inplace_writes_the_gradient_over_the_logits():
    leaves, labels = problem()
    logits = logits_of(leaves)
    want = torch.autograd.grad(masked_cross_entropy(logits, labels), logits)[0]
    worked = logits * 1
    loss = masked_cross_entropy(worked, labels, inplace=True, backend=None if native.module is None else "cpu")
    (got,) = torch.autograd.grad(loss, logits)
    assert torch.equal(got, want)
    if native.module is not None:
        assert torch.equal(worked, want)
        worked = logits * 1
        worked_squared = worked.square().sum()
        masked_cross_entropy(worked, labels, inplace=True).backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            worked_squared.backward()


def test_inplace_refuses_a_parameter_and_a_second_backward():
    leaves, labels = problem()
    logits = logits_of(leaves)
    with pytest.raises(ValueError, match="overwrite a parameter"):
        masked_cross_entropy(logits, labels, inplace=True)
    if native.module is not None:
        loss = masked_cross_entropy(logits * 1, labels, inplace=True, backend="cpu")
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward needs inplace=False"):
            loss.backward()


@pytest.mark.parametrize("label", [-1, 77, -101])
def test_label_out_of_range(label):
    leaves, labels = problem()
    labels[4] = label
    with pytest.raises(ValueError, match=f"label {label} in row 4 is outside"):
        masked_cross_entropy(logits_of(leaves), labels)
    with pytest.raises(ValueError, match=f"label {label} in row 4 is outside"):
        masked_linear_cross_entropy(*leaves[:2], labels)


def test_shapes_and_dtypes_that_do_not_fit():
    leaves, labels = problem()
    logits = logits_of(leaves)
    for bad, error, words in (
        (lambda: masked_cross_entropy(logits[None], labels), ValueError, "flatten the batch first"),
        (lambda: masked_cross_entropy(logits, labels[:-1]), ValueError, "one per row"),
        (lambda: masked_cross_entropy(logits, labels.float()), TypeError, "must be int32 or int64"),
        (lambda: masked_cross_entropy(logits.long(), labels), TypeError, "must be fp32, bf16 or fp16"),
        (lambda: masked_cross_entropy(logits, labels, label_smoothing=1.0), ValueError, r"in \[0, 1\)"),
        (lambda: masked_cross_entropy(logits, labels, softcap=0.0), ValueError, "above 0 or None"),
        (lambda: masked_cross_entropy(logits, labels, reduction="avg"), ValueError, "one of mean, sum, none"),
        (lambda: masked_linear_cross_entropy(leaves[0], leaves[1][:0], labels), ValueError, "FSDP or ZeRO-3"),
        (lambda: masked_linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2][1:]), ValueError, "bias must be"),
        (lambda: masked_linear_cross_entropy(*leaves[:2], labels, chunk_rows=0), ValueError, "at least 1"),
    ):
        with pytest.raises(error, match=words):
            bad()


def test_second_derivative_says_what_to_do():
    leaves, labels = problem()
    logits = logits_of(leaves)
    if native.module is not None:
        for loss, leaf in (
            (masked_cross_entropy(logits, labels), logits),
            (masked_linear_cross_entropy(*leaves[:2], labels), leaves[0]),
        ):
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative.*backend='reference'"):
                gradient.square().sum().backward()
    loss = masked_cross_entropy(logits, labels, backend="reference")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    gradient.square().sum().backward()
    assert logits.grad.any()


def test_autocast_multiplies_in_its_dtype_and_keeps_the_weight_gradient():
    leaves, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2])
    rounded = masked_linear_cross_entropy(*(x.bfloat16() for x in leaves[:2]), labels, leaves[2].bfloat16())
    assert loss == rounded
    assert [g.dtype for g in torch.autograd.grad(loss, leaves)] == [torch.float32] * 3


def test_weight_gradient_adds_up_in_fp32_over_chunks():
    """In bf16, 256 chunks of one row each: a bf16 sum would stall; the fp32 sum, rounded once, is within one rounding."""
    leaves, labels = problem(rows=256, classes=5, width=8, labelled=1.0, dtype=torch.bfloat16)
    wide = exact(leaves)
    got = masked_linear_cross_entropy(*leaves[:2], labels, reduction="sum", chunk_rows=1)
    want = masked_linear_cross_entropy(*wide[:2], labels, reduction="sum", backend="reference")
    close(torch.autograd.grad(got, leaves[1])[0], torch.autograd.grad(want, wide[1])[0], 8e-3)


def test_only_wanted_gradients():
    leaves, labels = problem()
    want = torch.autograd.grad(masked_linear_cross_entropy(*leaves[:2], labels, leaves[2]), leaves)
    for i in range(3):
        inputs = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]
        masked_linear_cross_entropy(*inputs[:2], labels, inputs[2]).backward()
        assert torch.equal(inputs[i].grad, want[i]) and all(x.grad is None for j, x in enumerate(inputs) if j != i)


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_threads_do_not_change_a_bit():
    leaves, labels = problem(rows=64, classes=3001)
    logits, before, results = logits_of(leaves), torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        loss = masked_cross_entropy(logits, labels, backend="cpu")
        results.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    best = native.module.current_isa()
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(best):
        pytest.skip(f"this processor has no {isa}")
    leaves, labels = problem(classes=1003)
    logits = logits_of(leaves)
    (wide,) = exact([logits])
    native.module.set_isa(isa)
    try:
        loss = masked_cross_entropy(logits, labels, backend="cpu")
        (gradient,) = torch.autograd.grad(loss, logits)
    finally:
        native.module.set_isa(best)
    want = reference.masked_cross_entropy(wide, labels)
    close(loss.detach(), want.detach(), 1e-6)
    close(gradient, torch.autograd.grad(want, wide)[0], 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction):
    leaves, labels = problem()

    def step(hidden, weight, bias, labels):
        head = masked_linear_cross_entropy(hidden, weight, labels, bias, reduction=reduction)
        return head.sum() + masked_cross_entropy(hidden @ weight.T, labels, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, labels)
    plain = step(*leaves, labels)
    torch.testing.assert_close(compiled, plain)
    for got, want in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_registered_ops():
    leaves, labels = problem()
    options = (IGNORED, 0.1, 1e-3, 5.0)
    logits = logits_of(leaves)
    for reduction in ("mean", "none"):
        torch.library.opcheck(torch.ops.reca.masked_cross_entropy.default, (logits, labels, *options, reduction, "cpu"))
        torch.library.opcheck(
            torch.ops.reca.masked_linear_cross_entropy.default,
            (*leaves[:2], labels, leaves[2], *options, reduction, 4, torch.float32, [True] * 3, "cpu"),
        )
