"""template_concat against its definition and fp64; concat_plan; edge cases; system behaviour."""

import pytest
import torch

from reca_kernels import TextSegment, VisualSegment, concat_plan, native, template_concat
from reca_kernels.reference import template_concat as reference

BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(native.module is None, reason=str(native.missing)))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(width=37, dtype=torch.float32, seed=0):
    """Table [11, D], visual [2, 3, D], two additive tables, and indices [2, 9] that repeat rows and skip some."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    table, visual, position, kind = draw(11, width), draw(2, 3, width), draw(9, width), draw(2, width)
    src = torch.tensor([[4, 4, -1, -2, -3, 0, 10, 4, 0], [7, -4, -5, -6, -6, 3, 3, 3, 1]])
    where = torch.arange(9).expand(2, 9)
    which = torch.where(src < 0, 1, -1)
    return (table, visual, position, kind), src, [where, which]


def run(leaves, src, indices, **arguments):
    table, visual, *rows = leaves
    return template_concat(table, visual, src, adds=list(zip(rows, indices, strict=True)), **arguments)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 1100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_fp64(backend, width, dtype, index):
    leaves, src, indices = problem(width, dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    src, indices = src.to(index), [i.to(index) for i in indices]
    got = run(leaves, src, indices, backend=backend)
    want = reference.template_concat(*wide[:2], src, adds=list(zip(wide[2:], indices, strict=True)))
    assert got.shape == (2, 9, width) and got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for mine, true in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, wide, upstream.double()), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_nothing_is_added_to_are_copied(backend):
    (table, visual, *_), src, _ = problem(dtype=torch.bfloat16)
    x = template_concat(table, visual, src, backend=backend)
    for b in range(2):
        for t in range(9):
            row = int(src[b, t])
            source = table[row] if row >= 0 else visual.flatten(0, 1)[-1 - row]
            assert torch.equal(x[b, t], source)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend):
    (table, visual, position, _), src, (where, _) = problem()
    half = visual.detach().bfloat16().requires_grad_()
    x = template_concat(table, half, src, adds=[(position, where)], out_dtype=torch.float32, backend=backend)
    want = reference.template_concat(table, half.float(), src, adds=[(position, where)])
    torch.testing.assert_close(x, want)
    assert torch.autograd.grad(x.sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    (table, visual, *_), _, _ = problem()
    x = template_concat(table, visual[:, :0], torch.zeros(2, 0, dtype=torch.int64), backend=backend)
    assert x.shape == (2, 0, table.shape[1])
    gradients = torch.autograd.grad(x.sum(), (table, visual), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)
    words_only = template_concat(table, visual[:0], torch.tensor([1, 2]), backend=backend)
    assert torch.equal(words_only, table[1:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_sources_and_gradient(backend):
    (table, visual, *_), src, _ = problem(width=16)
    want = template_concat(table, visual, src, backend=backend)
    padded = torch.cat((table.detach(), table.detach()), 1)[:, :16]
    turned = visual.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    got = template_concat(padded, turned, src, backend=backend)
    assert torch.equal(got, want)
    upstream = torch.randn(2, 16, 9, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    assert torch.equal(
        torch.autograd.grad(got, turned, upstream)[0], torch.autograd.grad(want, visual, upstream.contiguous())[0]
    )


def test_row_that_is_not_there():
    (table, visual, position, _), src, (where, _) = problem()
    with pytest.raises(ValueError, match=r"src must be in \[-6, 11\).*got 11"):
        template_concat(table, visual, torch.where(src == 10, 11, src))
    with pytest.raises(ValueError, match="got -7"):
        template_concat(table, visual, torch.where(src == -6, -7, src))
    with pytest.raises(ValueError, match=r"adds\[0\] must be below 9"):
        template_concat(table, visual, src, adds=[(position, where + 1)])


def test_arguments_that_do_not_fit():
    (table, visual, position, _), src, (where, _) = problem()
    for bad, error, words in (
        (lambda: template_concat(table, visual[..., 1:], src), ValueError, "the table's D = 37"),
        (lambda: template_concat(table, visual, src.float()), TypeError, "must be int32 or int64"),
        (lambda: template_concat(table, visual, src, adds=[(position, where[0])]), ValueError, "shaped like src"),
        (lambda: template_concat(table.int(), visual, src), TypeError, "must be fp32, bf16 or fp16"),
    ):
        with pytest.raises(error, match=words):
            bad()


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_threads_do_not_change_a_bit():
    leaves, src, indices = problem(width=1100)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        x = run(leaves, src, indices, backend="cpu")
        results.append((x.detach(), *torch.autograd.grad(x.square().sum(), leaves)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_second_derivative_says_what_to_do():
    leaves, src, indices = problem()
    (gradient,) = torch.autograd.grad(run(leaves, src, indices).square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_compiles_into_one_graph():
    leaves, src, indices = problem()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(leaves, src, indices)
    plain = run(leaves, src, indices)
    assert torch.equal(compiled, plain)
    for got, want in zip(
        torch.autograd.grad(compiled.square().sum(), leaves), torch.autograd.grad(plain.square().sum(), leaves), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.skipif(native.module is None, reason=str(native.missing))
def test_registered_ops():
    (table, visual, position, kind), src, indices = problem()
    rows = [table, visual.detach().flatten(0, 1).requires_grad_(), position, kind]
    flat = [i.reshape(-1) for i in (src, *indices)]
    torch.library.opcheck(torch.ops.reca.template_concat.default, (rows, flat, torch.float32, "cpu"))


# ---- the plan ----

SAMPLES = [
    [TextSegment([5, 6]), VisualSegment(3), TextSegment([7, 8], labels=[-100, 8])],
    [VisualSegment(1), TextSegment(torch.tensor([9]), torch.tensor([9]))],
]


def test_packed_plan():
    plan = concat_plan(SAMPLES)
    assert plan.src.tolist() == [5, 6, -1, -2, -3, 7, 8, -4, 9]
    assert plan.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert plan.segment_ids.tolist() == [0] * 7 + [1] * 2
    assert plan.labels.tolist() == [-100] * 6 + [8, -100, 9]
    assert plan.cu_seqlens.tolist() == [0, 7, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_plan(side):
    plan = concat_plan(SAMPLES, layout=side, length=8, pad_id=2)
    own = [-4, 9]
    assert plan.src[1].tolist() == ([2] * 6 + own if side == "left" else own + [2] * 6)
    assert (plan.segment_ids[1] == -1).sum() == 6 and plan.src.shape == (2, 8)
    assert plan.labels[1].tolist().count(-100) == 7
    assert plan.position_ids[1].tolist() == ([0] * 7 + [1] if side == "left" else [0, 1] + [0] * 6)


def test_plan_refuses():
    with pytest.raises(ValueError, match="sample 0 has 7 positions, more than length=6"):
        concat_plan(SAMPLES, layout="left", length=6)
    with pytest.raises(ValueError, match="packed samples have 9 positions"):
        concat_plan(SAMPLES, length=8)
    with pytest.raises(ValueError, match="give one label per id"):
        concat_plan([[TextSegment([1, 2], [1])]])
    with pytest.raises(ValueError, match="numbers >= 0"):
        concat_plan([[TextSegment([-3])]])
    with pytest.raises(ValueError, match="'packed', 'left' or 'right'"):
        concat_plan(SAMPLES, layout="center")
