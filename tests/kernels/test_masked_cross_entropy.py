"""Masked cross-entropy of given logits against fp64; edge cases; system behaviour; what the Triton compiler made."""

import pytest
import torch

from reca_kernels import masked_cross_entropy, native
from reca_kernels.masked_cross_entropy import reference
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from tests.kernels import cubin
from tests.kernels.backends import targets
from tests.kernels.cross_entropy import CASES, DTYPES, IGNORED, close, exact, gradients, logits_of, problem
from tests.kernels.rounding import same_numbers, ties

OP = "masked_cross_entropy"
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), targets(OP))
KERNELS = pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False))
ON_GPUS = pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False, skip=("cpu",)))
ON_CPUS = pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False, skip=("triton", "cuda")))


@pytest.mark.parametrize(("options", "reduction"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@EVERYWHERE
def test_loss_and_gradient(backend, device, dtype, options, reduction):
    leaves, labels = problem(dtype=dtype, device=device)
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


def close_to_exact(logits, labels, backend, **options):
    """Loss and gradient of fp32 logits, whatever their layout."""
    logits = logits.detach().requires_grad_()
    (wide,) = exact([logits])
    loss = masked_cross_entropy(logits, labels, backend=backend, **options)
    want = reference.masked_cross_entropy(wide, labels, **options)
    close(loss.detach(), want.detach(), 1e-6)
    close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(want, wide)[0], 1e-5)


# Around a vector of 4 and of 16 elements, around what a thread block takes at a time, and a prime beside them.
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 15, 16, 17, 64, 2053, 4096, 8209, 10007])
@EVERYWHERE
def test_widths(backend, device, classes):
    leaves, labels = problem(rows=4, classes=classes, device=device)
    close_to_exact(logits_of(leaves), labels, backend, label_smoothing=0.1)


# The last lane of a vector, that of a block, a whole block, and one among logits that are masked.
@pytest.mark.parametrize(("classes", "nan", "masked"), [
    (64, [63], []), (2048, [2047], []), (9000, range(4096), []), (9000, range(8192), []), (5000, [100], range(4000)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERYWHERE
def test_nan_is_never_left_out(backend, device, dtype, classes, nan, masked):
    x = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))
    x[0, list(masked)] = -torch.inf
    x[0, list(nan)] = torch.nan
    x = x.to(device, dtype).requires_grad_()
    labels = torch.tensor([classes - 2, 3], device=device)
    loss = masked_cross_entropy(x, labels, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [True, False]
    assert grad[0, list(nan)].isnan().all() and grad[1].isfinite().all()


@pytest.mark.parametrize("size", [1e12, 1e15, 1e17])
@EVERYWHERE
def test_gradients_of_equal_logits_however_large(backend, device, size):
    x = torch.full((1, 15), size, device=device, requires_grad=True)
    loss = masked_cross_entropy(x, torch.tensor([3], device=device), backend=backend)
    want = torch.full((1, 15), 1 / 15)
    want[0, 3] -= 1
    close(torch.autograd.grad(loss, x)[0], want.to(device), 1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.5])
@EVERYWHERE
def test_a_common_offset_costs_no_digits(backend, device, label_smoothing):
    """Logits around 1e5: log sum exp minus the label's logit, formed from the sum, would lose five digits, and so would
    the sum of all logits, of which smoothing takes the mean."""
    leaves, labels = problem(classes=5000, device=device)
    close_to_exact(logits_of(leaves).detach() + 2**17, labels, backend, label_smoothing=label_smoothing)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-3}, {"softcap": 5.0}], ids=["alone", "z-loss", "softcap"])
@pytest.mark.parametrize("label_smoothing", [0.1, 0.9])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@EVERYWHERE
def test_a_mean_of_huge_logits_does_not_overflow(backend, device, label_smoothing, options):
    """Neither the sum of the logits nor their difference is an fp32 number, but the smoothed loss is."""
    x = torch.randn(4, 5003, generator=torch.Generator().manual_seed(0))
    x[0, ::2], x[1], x[2] = 3e38, 3e38, -3e38
    x[0, [7, 9]] = x[1, 11] = -3e38
    x[3] *= 1e37
    x = x.to(device).requires_grad_()
    labels = torch.tensor([2, 11, 4, int(x[3].argmax())], device=device)
    (wide,) = exact([x])
    options = {**options, "label_smoothing": label_smoothing, "reduction": "none"}
    loss, want = (
        masked_cross_entropy(x, labels, backend=backend, **options),
        reference.masked_cross_entropy(wide, labels, **options),
    )
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=0)  # infinite only where the exact one is too large
    (got,), (true,) = (torch.autograd.grad(y.sum(), z) for y, z in ((loss, x), (want, wide)))
    torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("masked", [slice(8192), slice(100, None), slice(1, None, 2)], ids=["first", "last", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERYWHERE
def test_classes_that_are_masked_are_as_if_not_there(backend, device, dtype, masked):
    """Logits of -inf, also where they fill all that a vector or a block takes at a time."""
    x = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x[:, masked] = -torch.inf
    there = (x[0] != -torch.inf).nonzero()[:, 0]
    x.requires_grad_()
    (wide,) = exact([x[:, there]])
    loss = masked_cross_entropy(x, there[[0, 7, -1]], backend=backend)
    want = reference.masked_cross_entropy(wide, torch.tensor([0, 7, len(there) - 1], device=device))
    close(loss.detach(), want.detach(), 1e-6)
    (gradient,) = torch.autograd.grad(loss, x)
    close(gradient[:, there], torch.autograd.grad(want, wide)[0], 1e-5 if dtype == torch.float32 else 5e-3)
    assert not gradient[:, masked].any()


@EVERYWHERE
def test_probability_minus_one_is_formed_before_rounding(backend, device):
    """A certain label in bf16: the gradient is p - 1 = -0.002, which p rounded to bf16 first would make 0."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16, device=device)
    logits[0, 0] = 6.25
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, torch.tensor([0], device=device), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    p = torch.sigmoid(torch.tensor(6.25, dtype=torch.float64))
    assert float(gradient[0, 0]) == pytest.approx(float(p - 1), rel=4e-3)


@KERNELS
def test_a_nearly_certain_label_keeps_its_gradient(backend, device):
    """1 - p = 2e-8 is below the last digit of an fp32 sum that begins with 1."""
    logits = torch.zeros(1, 3000, device=device)
    logits[0, 1234] = 25.8
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, torch.tensor([1234], device=device), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    (wide,) = exact([logits])
    want = torch.autograd.grad(reference.masked_cross_entropy(wide, torch.tensor([1234], device=device)), wide)[0]
    assert float(gradient[0, 1234]) == pytest.approx(float(want[0, 1234]), rel=1e-2)


@KERNELS
def test_small_probabilities_keep_their_digits(backend, device):
    """Each alone, not as a part of a norm: from 1 down to e^-80, and 0 for a logit of -inf."""
    logits = -torch.linspace(0, 80, 4099, device=device)[None]
    logits[0, 77] = float("-inf")
    label = torch.tensor([3], device=device)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_cross_entropy(leaf, label, backend=backend), leaf)
    (want,) = torch.autograd.grad(reference.masked_cross_entropy(wide, label), wide)
    assert gradient[0, 77] == 0
    off = (gradient - want).abs() / want.abs().clamp(min=1e-37)
    assert float(off.max()) < 5e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@EVERYWHERE
def test_rows_without_label_are_not_read(backend, device, poison):
    leaves, labels = problem(device=device)
    logits = logits_of(leaves).detach()
    logits[labels == IGNORED] = poison
    logits.requires_grad_()
    loss = masked_cross_entropy(logits, labels, backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all() and not gradient[labels == IGNORED].any()


@pytest.mark.parametrize(
    ("place", "value"),
    [("other", float("-inf")), ("all", float("-inf")), ("other", float("inf")), ("other", float("nan"))],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@EVERYWHERE
def test_infinite_logits_are_what_torch_makes_of_them(backend, device, place, value):
    leaves, _ = problem(rows=2, device=device)
    labels = torch.tensor([3, 5], device=device)
    logits = logits_of(leaves).detach()
    logits[0, 10 if place == "other" else slice(None)] = value
    loss = masked_cross_entropy(logits, labels, reduction="none", backend=backend)
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, want, equal_nan=True)


@EVERYWHERE
def test_a_softcap_far_above_the_logits_costs_no_digits(backend, device):
    """A softcap multiplies the error of tanh near 0, which must therefore be relative."""
    leaves, labels = problem(device=device)
    close_to_exact(logits_of(leaves), labels, backend, softcap=1e5)


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@EVERYWHERE
def test_no_labels_at_all(backend, device, reduction, rows):
    leaves, labels = problem(rows=rows, labelled=0.0, device=device)
    logits = logits_of(leaves)
    loss = masked_cross_entropy(logits, labels, reduction=reduction, backend=backend)
    assert loss.shape == ((rows,) if reduction == "none" else ()) and not loss.any()
    assert not torch.autograd.grad(loss.sum(), logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "begins anywhere", "columns of wider rows", "transposed"])
@EVERYWHERE
def test_layouts(backend, device, layout, dtype):
    """The same bits, however rows lie in memory, and with labels of either size."""
    leaves, labels = problem(rows=3, dtype=dtype, labelled=0.9, device=device)
    plain = logits_of(leaves)
    rows, classes = plain.shape
    if layout == "transposed":
        view = plain.detach().T.contiguous().T
    else:
        lead = 0 if layout == "padded" else 3
        beside = 2003 if layout == "columns of wider rows" else 3  # then the gradient is packed and begins elsewhere
        around = torch.full((rows, classes + beside + lead), float("nan"), dtype=dtype, device=device)
        view = around[:, lead : lead + classes]
        view.copy_(plain.detach())
    view.requires_grad_()
    loss, want = (masked_cross_entropy(x, y, backend=backend) for x, y in ((view, labels.int()), (plain, labels)))
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, view), torch.autograd.grad(want, plain), **tolerance)


@pytest.mark.parametrize(("beside", "kept"), [(51, 128), (2000, 77)], ids=["padding", "a slice"])
@ON_GPUS
def test_gradient_has_the_pitch_of_padded_logits(backend, device, beside, kept):
    leaves, labels = problem(device=device)
    logits = torch.nn.functional.pad(logits_of(leaves).detach(), (0, beside))[:, :77].requires_grad_()
    (gradient,) = torch.autograd.grad(masked_cross_entropy(logits, labels, backend=backend), logits)
    assert gradient.stride() == (kept, 1)


@ON_CPUS
def test_gradient_has_no_padding(backend, device):
    """Torch's bf16 matmul with AMX reads it."""
    leaves, labels = problem(dtype=torch.bfloat16, device=device)
    logits = torch.nn.functional.pad(logits_of(leaves).detach(), (0, 51))[:, :77].requires_grad_()
    (gradient,) = torch.autograd.grad(masked_cross_entropy(logits, labels, backend=backend), logits)
    assert gradient.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [(slice(1, None), slice(None)), (slice(None), slice(1, None))], ids=["rows", "columns"])
@ON_GPUS
def test_gradient_of_a_slice_begins_where_its_logits_do(backend, device, cut, dtype):
    """As far from a 16-byte boundary, so that both are read in equal steps of 16 bytes."""
    leaves, labels = problem(rows=7, classes=78, dtype=dtype, device=device)
    whole = logits_of(leaves).detach()
    view, labels = whole[cut], labels[cut[0]].clamp(max=76)
    results = []
    for logits in (view.detach().requires_grad_(), view.contiguous().requires_grad_()):
        results.append(torch.autograd.grad(masked_cross_entropy(logits, labels, backend=backend), logits)[0])
    got, want = results
    assert view.data_ptr() % 16 != 0 and got.data_ptr() % 16 == view.data_ptr() % 16 and got.stride() == view.stride()
    torch.testing.assert_close(got, want)


@KERNELS
def test_a_row_does_not_see_its_batch(backend, device):
    """The same bits alone, in another place, and the second time."""
    leaves, labels = problem(classes=2053, dtype=torch.bfloat16, labelled=1.0, device=device)
    logits = logits_of(leaves)
    alone = logits[4:5].detach().clone().requires_grad_()
    results = [
        masked_cross_entropy(x, y, reduction="none", label_smoothing=0.1, backend=backend)
        for x, y in ((logits, labels), (logits, labels), (alone, labels[4:5]))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0][4:5], results[2])
    (whole,), (one,) = (torch.autograd.grad(r.sum(), x) for r, x in zip(results[1:], (logits, alone), strict=True))
    assert one.any() and torch.equal(whole[4:5], one)


@KERNELS
def test_expanded_upstream_gradient(backend, device):
    leaves, labels = problem(device=device)
    logits = logits_of(leaves)
    loss = masked_cross_entropy(logits, labels, reduction="none", backend=backend)
    upstream = torch.tensor(-0.3, device=device)
    (got,) = torch.autograd.grad(loss, logits, upstream.expand_as(loss), retain_graph=True)
    (want,) = torch.autograd.grad(loss, logits, upstream.repeat(len(loss)))
    assert got.any() and torch.equal(got, want)


@pytest.mark.parametrize("classes", [77, 20001])  # the second, whose rows begin anywhere, is in pieces on GPUs
@KERNELS
def test_inplace_writes_the_gradient_over_the_logits(backend, device, classes):
    leaves, labels = problem(classes=classes, device=device)
    logits = logits_of(leaves)
    want = torch.autograd.grad(masked_cross_entropy(logits, labels, backend=backend), logits)[0]
    worked = logits * 1
    loss = masked_cross_entropy(worked, labels, inplace=True, backend=backend)
    (got,) = torch.autograd.grad(loss, logits)
    assert torch.equal(got, want) and torch.equal(worked, want)
    worked = logits * 1
    worked_squared = worked.square().sum()
    masked_cross_entropy(worked, labels, inplace=True, backend=backend).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        worked_squared.backward()


@KERNELS
def test_inplace_refuses_a_parameter_and_a_second_backward(backend, device):
    leaves, labels = problem(device=device)
    logits = logits_of(leaves)
    with pytest.raises(ValueError, match="overwrite a leaf tensor"):
        masked_cross_entropy(logits, labels, inplace=True, backend=backend)
    loss = masked_cross_entropy(logits * 1, labels, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward needs inplace=False"):
        loss.backward()


@pytest.mark.parametrize("label", [-1, 77, -101])
def test_label_out_of_range(label):
    leaves, labels = problem()
    labels[4] = label
    with pytest.raises(ValueError, match=f"label {label} in row 4 is outside"):
        masked_cross_entropy(logits_of(leaves), labels)


@KERNELS
def test_unchecked_label_out_of_range_poisons_its_row(backend, device, monkeypatch):
    monkeypatch.setattr("reca_kernels.checks.labels_inside", lambda *_: None)
    leaves, labels = problem(rows=4, labelled=1.0, device=device)
    labels[1], labels[2] = 77, -3
    logits = logits_of(leaves)
    loss = masked_cross_entropy(logits, labels, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.any(1).tolist() == [True, False, False, True]


def test_shapes_and_dtypes_that_do_not_fit():
    leaves, labels = problem()
    logits, one = logits_of(leaves), torch.nn.Parameter(torch.ones(()))
    for bad, error, words in (
        (lambda: masked_cross_entropy(logits[None], labels), ValueError, "flatten the batch first"),
        (lambda: masked_cross_entropy(logits, labels[:-1]), ValueError, "one per row"),
        (lambda: masked_cross_entropy(logits, labels.float()), TypeError, "must be int32 or int64"),
        (lambda: masked_cross_entropy(logits, labels, softcap=one), TypeError, "softcap must be a number, got P"),
        (lambda: masked_cross_entropy(logits, labels, z_loss=one), TypeError, "z_loss must be a number, got Parameter"),
        (lambda: masked_cross_entropy(logits, labels, z_loss=None), TypeError, "z_loss must be a number, got NoneType"),
        (lambda: masked_cross_entropy(logits.long(), labels), TypeError, "must be fp32, bf16 or fp16"),
        (lambda: masked_cross_entropy(logits, labels, label_smoothing=1.0), ValueError, r"in \[0, 1\)"),
        (lambda: masked_cross_entropy(logits, labels, softcap=0.0), ValueError, "positive or None"),
        (lambda: masked_cross_entropy(logits, labels, reduction="avg"), ValueError, "one of mean, sum, none"),
    ):
        with pytest.raises(error, match=words):
            bad()


@KERNELS
def test_second_derivative_says_what_to_do(backend, device):
    leaves, labels = problem(device=device)
    logits = logits_of(leaves)
    (gradient,) = torch.autograd.grad(masked_cross_entropy(logits, labels, backend=backend), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        gradient.square().sum().backward()


def test_second_derivative_of_the_reference():
    leaves, labels = problem()
    logits = logits_of(leaves)
    loss = masked_cross_entropy(logits, labels, backend="reference")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    gradient.square().sum().backward()
    assert logits.grad.any()


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


def test_every_instruction_set(isa):
    leaves, labels = problem(classes=1003)
    logits = logits_of(leaves)
    (wide,) = exact([logits])
    loss = masked_cross_entropy(logits, labels, backend="cpu")
    (gradient,) = torch.autograd.grad(loss, logits)
    test_a_nearly_certain_label_keeps_its_gradient("cpu", "cpu")
    test_small_probabilities_keep_their_digits("cpu", "cpu")
    test_a_softcap_far_above_the_logits_costs_no_digits("cpu", "cpu")
    test_classes_that_are_masked_are_as_if_not_there("cpu", "cpu", torch.bfloat16, slice(8192))
    want = reference.masked_cross_entropy(wide, labels)
    close(loss.detach(), want.detach(), 1e-6)
    close(gradient, torch.autograd.grad(want, wide)[0], 1e-6)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}, {"z_loss": 0.01}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [3, 100])
def test_extreme_logits_with_every_instruction_set(isa, classes, dtype, options):
    """NaN, infinities, denormals and huge numbers, alone and beside ordinary logits, give what the reference gives."""
    extremes = [0.0, 1e-40, -1e-40, 88.0, -88.0, 1e36, -1e36, torch.inf, -torch.inf, torch.nan]
    ordinary = torch.randn(classes, generator=torch.Generator().manual_seed(0))
    rows = []
    for first in extremes:
        for last in extremes:
            for row in (torch.full((classes,), first), ordinary.clone()):
                row[0], row[-1] = first, last
                rows.append(row)
    logits = torch.stack(rows).to(dtype).requires_grad_()
    labels = torch.zeros(len(rows), dtype=torch.int64)
    results = []
    for backend in ("cpu", "reference"):
        loss = masked_cross_entropy(logits, labels, reduction="none", backend=backend, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), logits)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("place", [3, 99])  # in a whole vector, and in what is left
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_rounded_to_nearest(isa, dtype, place):
    """Ties to even. Where one class has probability 1 and another one the label, it gets the upstream gradient."""
    upstream = ties(dtype)
    upstream = upstream[~upstream.isinf()]
    logits = torch.full((len(upstream), 100), -torch.inf, dtype=dtype)
    logits[:, place] = 0
    logits.requires_grad_()
    labels = torch.full((len(upstream),), 50)
    loss = masked_cross_entropy(logits, labels, reduction="none", backend="cpu")
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert same_numbers(gradient[:, place], upstream.to(dtype))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@KERNELS
def test_compiles_into_one_graph(backend, device, reduction):
    leaves, labels = problem(device=device)

    def step(hidden, weight, labels):
        return masked_cross_entropy(hidden @ weight.T, labels, reduction=reduction, backend=backend).sum()

    torch._dynamo.reset()  # one code object, many backends: the limit of recompilations is 8
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves[:2], labels)
    plain = step(*leaves[:2], labels)
    torch.testing.assert_close(compiled, plain)
    for got, want in zip(
        torch.autograd.grad(compiled, leaves[:2]), torch.autograd.grad(plain, leaves[:2]), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@KERNELS
def test_registered_op(backend, device, reduction):
    leaves, labels = problem(rows=3, device=device)
    torch.library.opcheck(
        torch.ops.reca.masked_cross_entropy.default,
        (logits_of(leaves), labels, IGNORED, 0.1, 1e-3, 5.0, reduction, False, backend),
    )


# ---- what Triton made ----

SHOW_O = 58498  # classes; rows of as many 16-bit elements begin on 4-byte boundaries only


def launches():
    from reca_kernels.masked_cross_entropy import triton as op

    labels, stats, one = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2), torch.ones(())
    everything = CrossEntropyOptions(IGNORED, 0.1, 1e-3, 5.0, "mean")
    plain = CrossEntropyOptions(IGNORED, 0.0, 0.0, None, "mean")
    for options, dtype, pitch in (
        (plain, torch.bfloat16, SHOW_O),
        (plain, torch.bfloat16, SHOW_O + 126),
        (plain, torch.float32, SHOW_O),
        (everything, torch.bfloat16, SHOW_O),
    ):
        logits = torch.empty(2, pitch, dtype=dtype)[:, :SHOW_O]
        op.forward(logits, labels, options)
        op.backward(one, one, logits, labels, stats, options, logits)


def test_compiled_for_every_gpu():
    made = cubin.compiled(launches)
    assert {(m.kernel, m.arch) for m in made} == {
        (kernel, arch) for kernel in ("forward_kernel", "backward_kernel", "reduce_kernel") for arch in cubin.ARCHS
    }
    for m in made:
        if m.kernel == "reduce_kernel":
            m.assert_lean(registers=128)
        else:  # 64 registers leave room for four blocks of 256 threads on a multiprocessor
            m.assert_lean(registers=64, loads=(128,), stores=(128,) if m.kernel == "backward_kernel" else ())
            assert m.loads[128] == 2  # in flight at a time, of 16 bytes each
