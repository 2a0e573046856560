"""Masked cross-entropy of a linear head against fp64; edge cases; system behaviour; what the Triton compiler made."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reca_kernels import masked_linear_cross_entropy
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_linear_cross_entropy import linear_chunks, reference
from reca_kernels.masked_linear_cross_entropy.plan import Machine, Plan, plan
from tests.kernels import cubin
from tests.kernels.backends import targets
from tests.kernels.cross_entropy import CASES, DTYPES, IGNORED, close, exact, gradients, problem

# numpy's, in Triton's interpreter: what lies between the last class and the pitch is computed, and then not taken.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OP = "masked_linear_cross_entropy"
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), targets(OP))
KERNELS = pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False))


@pytest.mark.parametrize(("options", "reduction"), CASES)
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


# In steps of several units; what a kernel may have of shared memory without asking, 48 KB, of which it has used some
# itself; more than a block has in the emulator.
@pytest.mark.parametrize(("classes", "biased"), [(2053, True), (2053, False), (12288, True), (17001, True)])
@EVERYWHERE
def test_wide_rows(backend, device, classes, biased):
    leaves, labels = problem(rows=7, classes=classes, width=8, device=device)
    leaves = leaves if biased else leaves[:2]
    wide = exact(leaves)
    loss = masked_linear_cross_entropy(*leaves[:2], labels, *leaves[2:], label_smoothing=0.1, backend=backend)
    want = reference.masked_linear_cross_entropy(*wide[:2], labels, *wide[2:], label_smoothing=0.1)
    close(loss.detach(), want.detach(), 1e-6)
    for got, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, wide), strict=True):
        close(got, true, 1e-5)


@EVERYWHERE
def test_labels_are_compacted_in_several_passes(backend, device):
    """A block of the CUDA kernel looks at 1024 labels at a time. Each of its passes finds some."""
    leaves, labels = problem(rows=2500, classes=33, width=8, labelled=0.01, device=device)
    assert [int((part != IGNORED).sum()) > 0 for part in labels.split(1024)] == [True] * 3
    wide = exact(leaves)
    options = {"reduction": "none", "max_labelled": 40}
    loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], backend=backend, **options)
    want = reference.masked_linear_cross_entropy(*wide[:2], labels, wide[2], **options)
    close(loss.detach(), want.detach(), 1e-6)
    for got, true in zip(gradients(loss, leaves), gradients(want, wide), strict=True):
        close(got, true, 1e-5)


@EVERYWHERE
def test_a_common_offset_of_smoothed_logits_costs_no_digits(backend, device):
    """The sum of 5000 logits around 1e5 would; the logits are whole numbers, so that their product is exact."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randint(-2, 3, size, generator=generator).float() for size in ((3, 8), (5000, 8)))
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight, torch.full((5000,), 2.0**17))]
    labels, wide = torch.tensor([0, 77, 4999], device=device), exact(leaves)
    loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], label_smoothing=0.5, backend=backend)
    want = reference.masked_linear_cross_entropy(*wide[:2], labels, wide[2], label_smoothing=0.5)
    close(loss.detach(), want.detach(), 1e-6)
    for got, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, wide), strict=True):
        close(got, true, 1e-4)  # of hidden: sums of large terms that cancel


@EVERYWHERE
def test_a_mean_of_huge_logits_does_not_overflow(backend, device):
    """Neither their sum nor difference is an fp32 number. The rows of hidden are unit vectors: logits = weight.T."""
    weight = torch.randn(5003, 3, generator=torch.Generator().manual_seed(0))
    weight[::2, 0], weight[1::2, 0], weight[:, 1] = 3e38, -3e38, 3e38
    weight[:, 2] *= 1e37
    weight, hidden = weight.to(device).requires_grad_(), torch.eye(3, device=device)
    labels = torch.tensor([2, 11, int(weight[:, 2].argmax())], device=device)
    wide, options = exact([weight])[0], {"label_smoothing": 0.1, "reduction": "none"}
    loss = masked_linear_cross_entropy(hidden, weight, labels, backend=backend, **options)
    want = reference.masked_linear_cross_entropy(hidden.double(), wide, labels, **options)
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=0)
    (got,), (true,) = (torch.autograd.grad(y.sum(), z) for y, z in ((loss, weight), (want, wide)))
    torch.testing.assert_close(got, true.float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@EVERYWHERE
def test_rows_without_label_are_not_read(backend, device, poison, dtype, reduction):
    """Neither what stands in them nor what comes back to their losses reaches anything."""
    leaves, labels = problem(device=device, dtype=dtype)
    results = []
    for junk in (0.0, poison):
        hidden = leaves[0].detach().clone()
        hidden[labels == IGNORED] = junk
        inputs = [hidden.requires_grad_(), *leaves[1:]]
        loss = masked_linear_cross_entropy(*inputs[:2], labels, inputs[2], reduction=reduction, backend=backend)
        up = torch.full_like(loss, 0.7)
        if loss.ndim:
            up[labels == IGNORED] = junk
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs, up)))
    for got, want in zip(*reversed(results), strict=True):
        assert want.isfinite().all() and torch.equal(got, want)


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
    """Transposed weight, a slice of a larger hidden state and a transposed one, int32 labels."""
    leaves, labels = problem(device=device)
    hidden, weight = leaves[0].detach(), leaves[1].detach()
    want = masked_linear_cross_entropy(hidden, weight, labels, backend=backend)
    for laid_out in (torch.cat((hidden, hidden), 1)[:, : hidden.shape[1]], hidden.T.contiguous().T):
        got = masked_linear_cross_entropy(laid_out, weight.T.contiguous().T, labels.int(), backend=backend)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), targets(OP, skip=("triton", "cuda")))
def test_memory_before_the_call_reaches_nothing(backend, device, dtype, monkeypatch):
    """Torch fills new memory with NaN under deterministic algorithms."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    leaves, labels = problem(rows=32, classes=333, width=64, dtype=dtype, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], backend=backend)
        found = gradients(loss, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (loss, *found))


@pytest.mark.parametrize("most", [None, 6, 9])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@EVERYWHERE
def test_room_for_more_rows_than_carry_a_label(backend, device, reduction, most):
    """The rows of products that are left over hold zeros, not what was in memory, and no row without a label."""
    leaves, labels = problem(rows=9, device=device)
    assert int((labels != IGNORED).sum()) == 6
    with torch.no_grad():
        leaves[0][labels == IGNORED] = float("nan")
    results = []
    for room in (9, most):
        loss = masked_linear_cross_entropy(
            *leaves[:2], labels, leaves[2], reduction=reduction, max_labelled=room, chunk_rows=3, backend=backend
        )
        results.append((loss.detach(), *gradients(loss, leaves)))
    for got, want in zip(*results, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rows", "classes", "chunks"), [(240, 77, 2), (440, 130, 3), (240, 301, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@EVERYWHERE
def test_products_as_a_gpu_has_them(backend, device, reduction, rows, classes, chunks, monkeypatch):
    """Columns beyond whole tiles apart, the bias's gradient by a product, chunks by waves: the same numbers."""
    monkeypatch.setattr(linear_chunks, "machine", lambda device: Machine(3, 0))
    leaves, labels = problem(rows=rows, classes=classes, width=8, device=device)
    most, (pitch, body) = int((labels != IGNORED).sum()), (-(-classes // 128) * 128, classes // 128 * 128 or 77)
    assert plan(most, classes, 8, 4, Machine(3, 0)) == Plan(128, chunks, pitch, body, classes)
    wide = exact(leaves)
    loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], reduction=reduction, backend=backend)
    want = reference.masked_linear_cross_entropy(*wide[:2], labels, wide[2], reduction=reduction)
    close(loss.detach(), want.detach(), 1e-6)
    for got, true in zip(gradients(loss, leaves), gradients(want, wide), strict=True):
        close(got, true, 1e-5)


def test_more_labels_than_said():
    leaves, labels = problem()
    with pytest.raises(ValueError, match="4 rows carry a label, more than max_labelled=3; raise"):
        masked_linear_cross_entropy(*leaves[:2], labels, max_labelled=3)


# The C++ kernels count by themselves.
@pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False, skip=("cpu",)))
def test_unchecked_labels_too_many_poison_their_rows(backend, device, monkeypatch):
    monkeypatch.setattr("reca_kernels.checks.check_label_count", lambda *_: None)
    leaves, labels = problem(rows=9, device=device)
    labelled = (labels != IGNORED).nonzero()[:, 0].tolist()
    loss = masked_linear_cross_entropy(*leaves[:2], labels, reduction="none", max_labelled=3, backend=backend)
    assert loss.isnan().nonzero()[:, 0].tolist() == labelled[3:]
    (dx,) = torch.autograd.grad(loss.sum(), leaves[0])
    assert dx.any(1).nonzero()[:, 0].tolist() == labelled[:3]


@pytest.mark.parametrize("label", [-1, 77, -101])
def test_label_out_of_range(label):
    leaves, labels = problem()
    labels[4] = label
    with pytest.raises(ValueError, match=f"label {label} in row 4 is outside"):
        masked_linear_cross_entropy(*leaves[:2], labels)


@KERNELS
def test_unchecked_label_out_of_range_poisons_its_row(backend, device, monkeypatch):
    monkeypatch.setattr("reca_kernels.checks.labels_inside", lambda *_: None)
    leaves, labels = problem(rows=4, labelled=1.0, device=device)
    labels[1], labels[2] = 77, -3
    loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, True, False]
    got = torch.autograd.grad(loss.sum(), leaves)
    assert got[0].any(1).tolist() == [True, False, False, True]
    good = [0, 3]
    want = masked_linear_cross_entropy(leaves[0][good], leaves[1], labels[good], leaves[2], reduction="sum")
    for mine, true in zip(got, torch.autograd.grad(want, leaves), strict=True):
        close(mine, true, 1e-6)


def test_shapes_and_dtypes_that_do_not_fit():
    leaves, labels = problem()
    for bad, error, words in (
        (lambda: masked_linear_cross_entropy(leaves[0], leaves[1][:0], labels), ValueError, "FSDP or ZeRO-3"),
        (lambda: masked_linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2][1:]), ValueError, "bias must be"),
        (lambda: masked_linear_cross_entropy(*leaves[:2], labels, chunk_rows=0), ValueError, "at least 1"),
        (lambda: masked_linear_cross_entropy(*leaves[:2], labels, softcap=leaves[2][0]), TypeError, "must be a number"),
        (lambda: masked_linear_cross_entropy(*leaves[:2], labels, max_labelled=-1), ValueError, "at least 0 or None"),
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

    torch._dynamo.reset()  # one code object, many backends: the limit of recompilations is 8
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, labels)
    plain = step(*leaves, labels)
    torch.testing.assert_close(compiled, plain)
    for got, want in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("up", [1.0, 0.3])
@KERNELS
def test_gradients_are_scaled_where_they_are_unless_the_graph_stays(backend, device, up):
    """A gradient that was handed out stays as it is when the graph is asked again."""
    leaves, labels = problem(device=device)
    want = torch.autograd.grad(masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], backend="reference"), leaves)
    loss = masked_linear_cross_entropy(*leaves[:2], labels, leaves[2], backend=backend)
    saved = [x.data_ptr() for x in loss.grad_fn.saved_tensors[4:]]
    first = torch.autograd.grad(loss, leaves, torch.full_like(loss, up), retain_graph=True)
    copies = [x.clone() for x in first]
    assert not {x.data_ptr() for x in first} & set(saved)
    last = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2 * up))
    assert [x.data_ptr() for x in last] == saved
    for one, copy, two, true in zip(first, copies, last, want, strict=True):
        assert torch.equal(one, copy)
        close(one, up * true, 1e-5)
        close(two, 2 * up * true, 1e-5)


@pytest.mark.parametrize("count", [1, 20, 2060])
@pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False, skip=("cpu",)))
def test_scaling_a_gradient_that_is_not_aligned(backend, device, count):
    gradient = torch.randn(count + 3, generator=torch.Generator().manual_seed(0)).to(device)[3:]
    grad = torch.tensor(0.3, device=device)
    scaled = torch.ops.reca.masked_linear_cross_entropy_scale(gradient, grad, backend)
    assert torch.equal(scaled, gradient * grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@KERNELS
def test_registered_op(backend, device, reduction):
    leaves, labels = problem(rows=4, device=device)
    options, needs = (IGNORED, 0.1, 1e-3, 5.0, reduction), [reduction == "mean"] * 3
    torch.library.opcheck(
        torch.ops.reca.masked_linear_cross_entropy.default,
        (*leaves, labels, None, *options, 4, None, torch.float32, needs, backend),
    )


# ---- what Triton made ----

SHOW_O, PITCH = 58498, 58624


def launches():
    from reca_kernels.masked_linear_cross_entropy import triton as op

    everything = CrossEntropyOptions(IGNORED, 0.1, 1e-3, 5.0, "mean")
    plain = CrossEntropyOptions(IGNORED, 0.0, 0.0, None, "mean")
    numbers, losses, one = torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.ones(())
    op.compact_labelled_rows(numbers, plain, None)
    hidden = torch.empty(2, 2048, dtype=torch.bfloat16)
    op.gather_scatter_rows(hidden, numbers, hidden, None)
    op.gather_scatter_rows(hidden, None, hidden.float(), numbers)
    op.scale(hidden, one, torch.empty_like(hidden))
    op.scale(hidden, one, hidden)
    logits, bias = torch.empty(2, PITCH, dtype=torch.bfloat16)[:, :SHOW_O], torch.empty(PITCH, dtype=torch.bfloat16)
    for given, options in ((None, plain), (bias, everything)):
        op.row_gradients(logits, given, numbers, numbers, None, one, options, losses, True)


def test_compiled_for_every_gpu():
    made = cubin.compiled(launches)
    names = ("compact_labelled_rows_kernel", "gather_scatter_rows_kernel", "scale_kernel", "row_gradients_kernel")
    assert {(m.kernel, m.arch) for m in made} == {(name, arch) for name in names for arch in cubin.ARCHS}
    for m in made:
        if m.kernel == "row_gradients_kernel":
            # Twice through the row, two vectors in flight each time, and as many of the bias.
            m.assert_lean(registers=128, loads=(128,), stores=(128,))
            assert m.loads[128] == (8 if m.constants["BIAS"] else 4)
        else:
            m.assert_lean(registers=128, loads=() if m.kernel == "compact_labelled_rows_kernel" else (128,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("most", [3, 5, 8, 100])
def test_the_definition_multiplies_no_more_rows_than_max_labelled(reduction, most):
    """And gives the same: 3 of 8 rows carry a label, the others are NaN."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([-100, 4, -100, 0, -100, -100, 2, -100])
    hidden = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    hidden[labels == -100] = torch.nan
    weight = torch.randn(7, 6, dtype=torch.float64, generator=generator)
    results = []
    for bound in (None, most):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            loss = masked_linear_cross_entropy(
                x, w, labels, reduction=reduction, max_labelled=bound, backend="reference"
            )
        loss.sum().backward()
        results.append((loss, x.grad, w.grad))
    torch.testing.assert_close(results[1], results[0])
    assert counter.get_total_flops() == 2 * min(most, 8) * 6 * 7


def test_the_definition_is_fp32_whatever_the_default_dtype():
    leaves, labels = problem()
    torch.set_default_dtype(torch.float64)
    try:
        loss = masked_linear_cross_entropy(*leaves[:2], labels, max_labelled=4, backend="reference")
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32


def test_fp64_hidden_runs_in_fp64_and_an_fp64_weight_alone_does_not():
    leaves, labels = problem()
    narrow, wide = leaves[:2], exact(leaves)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_linear_cross_entropy(*wide, labels).dtype == torch.float64
    want = reference.masked_linear_cross_entropy(*wide, labels)
    torch.testing.assert_close(masked_linear_cross_entropy(wide[0], narrow[1], labels), want)
    assert masked_linear_cross_entropy(narrow[0], wide[1], labels).dtype == torch.float32


@KERNELS
def test_kernels_refuse_fp64_hidden(backend, device):
    leaves, labels = problem(device=device)
    with pytest.raises(RuntimeError, match="takes fp32, bf16 or fp16, got torch.float64"):
        masked_linear_cross_entropy(*exact(leaves)[:2], labels, backend=backend)
