"""template_concat against its definition and fp64; edge cases; system behaviour; what Triton compiled; concat_plan."""

import math
from functools import partial

import pytest
import torch

from reca_kernels import TextSegment, VisualSegment, concat_plan, native, template_concat
from reca_kernels.template_concat import reference, row_gradients
from tests.kernels import cubin
from tests.kernels.backends import targets
from tests.kernels.on_gpu import capture, needs_sanitizer, on_streams, sanitize
from tests.kernels.rounding import same_numbers, ties

OP = "template_concat"
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), targets(OP))
KERNELS = pytest.mark.parametrize(("backend", "device"), targets(OP, reference=False))
GPU_KERNELS = pytest.mark.parametrize(  # those that share the order of sums
    ("backend", "device"), [p for p in targets(OP, reference=False) if p.values[0] in ("triton", "cuda")]
)
ON_GPU = pytest.mark.parametrize("backend", ["cuda", "triton"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(width=37, dtype=torch.float32, seed=0, device="cpu"):
    """Table [11, D], visual [2, 3, D], two additive tables, and indices [2, 9] that repeat rows and skip some."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(device, dtype).requires_grad_()  # noqa: E731
    table, visual, position, kind = draw(11, width), draw(2, 3, width), draw(9, width), draw(2, width)
    src = torch.tensor([[4, 4, -1, -2, -3, 0, 10, 4, 0], [7, -4, -5, -6, -6, 3, 3, 3, 1]], device=device)
    where = torch.arange(9, device=device).expand(2, 9)
    which = torch.where(src < 0, 1, -1)
    return (table, visual, position, kind), src, [where, which]


def like(x, seed=1):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device, x.dtype)


def run(leaves, src, indices, **arguments):
    table, visual, *rows = leaves
    return template_concat(table, visual, src, adds=list(zip(rows, indices, strict=True)), **arguments)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 1100])
@EVERYWHERE
def test_against_fp64(backend, device, width, dtype, index):
    leaves, src, indices = problem(width, dtype, device=device)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    src, indices = src.to(index), [i.to(index) for i in indices]
    got = run(leaves, src, indices, backend=backend)
    want = reference.template_concat(*wide[:2], src, adds=list(zip(wide[2:], indices, strict=True)))
    assert got.shape == (2, 9, width) and got.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    upstream = like(got)
    for mine, true in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, wide, upstream.double()), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=4 * tolerance)


@EVERYWHERE
def test_rows_that_nothing_is_added_to_are_copied(backend, device):
    (table, visual, *_), src, _ = problem(dtype=torch.bfloat16, device=device)
    x = template_concat(table, visual, src, backend=backend)
    for b in range(2):
        for t in range(9):
            row = int(src[b, t])
            source = table[row] if row >= 0 else visual.flatten(0, 1)[-1 - row]
            assert torch.equal(x[b, t], source)


@pytest.mark.parametrize("width", [37, 40])
@EVERYWHERE
def test_dtypes_may_differ(backend, device, width):
    (table, visual, position, _), src, (where, _) = problem(width, device=device)
    half = visual.detach().bfloat16().requires_grad_()
    x = template_concat(table, half, src, adds=[(position, where)], out_dtype=torch.float32, backend=backend)
    want = reference.template_concat(table, half.float(), src, adds=[(position, where)])
    torch.testing.assert_close(x, want)
    got, true = (torch.autograd.grad(y, (table, half, position), like(x)) for y in (x, want))
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got, true, rtol=8e-3, atol=3e-2)  # a row used twice: the reference rounds in between


@EVERYWHERE
def test_the_gradient_keeps_and_reads_no_rows(backend, device):
    """What it is of may change before it, and nothing as large as the rows waits for it."""
    source = torch.randn(5, 8, device=device, requires_grad=True)
    table, visual = torch.randn(10, 8, device=device), source * 2
    src = torch.tensor([3, -1, -5, 3], device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        out = template_concat(table, visual, src, backend=backend)
    visual.add_(1)
    (grad,) = torch.autograd.grad(out.sum(), source)
    assert grad.tolist() == [[2.0] * 8, [0.0] * 8, [0.0] * 8, [0.0] * 8, [2.0] * 8]
    assert all(math.prod(shape) <= len(src) for shape in kept)


@EVERYWHERE
def test_empty(backend, device):
    (table, visual, *_), _, _ = problem(device=device)
    nothing = torch.zeros(2, 0, dtype=torch.int64, device=device)
    x = template_concat(table, visual[:, :0], nothing, backend=backend)
    assert x.shape == (2, 0, table.shape[1])
    gradients = torch.autograd.grad(x.sum(), (table, visual), allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)
    words_only = template_concat(table, visual[:0], torch.tensor([1, 2], device=device), backend=backend)
    assert torch.equal(words_only, table[1:3])


@EVERYWHERE
def test_strided_sources_and_gradient(backend, device):
    (table, visual, *_), src, _ = problem(width=16, device=device)
    want = template_concat(table, visual, src, backend=backend)
    padded = torch.cat((table, table.detach()), 1)[:, :16]
    turned = visual.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    got = template_concat(padded, turned, src, backend=backend)
    assert torch.equal(got, want)
    turned_upstream = like(want.detach().transpose(1, 2)).transpose(1, 2)
    wider = like(torch.cat((want.detach(), want.detach()), -1))[..., :16]  # as from a concatenation of channels
    for upstream in (turned_upstream, wider, wider[:1, :1].expand(2, 9, 16)):
        mine = torch.autograd.grad(got, (table, turned), upstream, retain_graph=True)
        theirs = torch.autograd.grad(want, (table, visual), upstream.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@EVERYWHERE
def test_index_with_a_stride(backend, device):
    """Of one dimension, reshape(-1) would have kept the stride, which kernels do not look at."""
    (table, visual, *_), src, _ = problem(device=device)
    apart = src.flatten().repeat_interleave(2)[::2]
    got = template_concat(table, visual, apart, adds=[(table, apart)], backend=backend)
    want = template_concat(table, visual, apart.clone(), adds=[(table, apart.clone())], backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@EVERYWHERE
def test_rows_that_do_not_begin_on_16_bytes(backend, device, dtype):
    (table, visual, *_), src, _ = problem(16, dtype, device=device)
    moved = []
    for x in (table, visual.detach().flatten(0, 1)):
        room = torch.zeros(x.numel() + 1, dtype=dtype, device=device)
        moved.append(room[1:].view(x.shape).copy_(x.detach()).requires_grad_())
    got, want = template_concat(*moved, src, backend=backend), template_concat(table, visual, src, backend=backend)
    assert torch.equal(got, want)
    upstream = torch.zeros(got.numel() + 1, dtype=dtype, device=device)[1:].view(got.shape).copy_(like(got))
    mine, theirs = torch.autograd.grad(got, moved, upstream), torch.autograd.grad(want, (table, visual), like(got))
    assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@KERNELS
def test_every_bit_is_copied(backend, device, dtype):
    """Zeros keep their sign, and what is not normal stays what it is, in the rows and in a gradient used once."""
    special = torch.tensor([0.0, -0.0, 6e-8, -6e-8, float("inf"), float("-inf"), 1.5, -2.0], device=device).to(dtype)
    rows = torch.stack((special, special.flip(0))).requires_grad_()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    src = torch.tensor([1, -1, 0, -2], device=device)
    x = template_concat(rows, rows.detach(), src, backend=backend)
    assert torch.equal(x.detach().view(bits), rows.detach()[[1, 0, 0, 1]].view(bits))
    (gradient,) = torch.autograd.grad(x, rows, x.detach())
    assert torch.equal(gradient.view(bits), rows.detach().view(bits))


@pytest.mark.parametrize("width", [1024, 1023])  # in units of 16 bytes, and with elements left
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@KERNELS
def test_other_dtypes_are_rounded_as_torch_rounds(backend, device, dtype, width):
    """To nearest, ties to even; from 16 bits to 32 every number is exact."""
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts bits off")
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for numbers, to in ((ties(dtype), dtype), (halves, torch.float32)):
        rows = numbers[: len(numbers) // width * width].view(-1, width)
        rows = torch.cat((rows, numbers[-width:][None]))  # the last ones, with the largest and NaN
        rows = rows[:: 8 if backend in ("triton", "cuda") and device == "cpu" else 1]
        src = torch.arange(len(rows), device=device)
        got = template_concat(rows.to(device), rows[:0].to(device), src, out_dtype=to, backend=backend)
        assert same_numbers(got.cpu(), rows.to(to))


def in_order(grad, index, flipped, count):
    """The gradient as reca_kernels/template_concat/row_gradients.py states it."""
    rows = -1 - index if flipped else index
    result = torch.zeros(count, grad.shape[1])
    for k in range(count):
        chunks = grad[rows == k].split(row_gradients.CHUNK) if (rows == k).any() else ()
        for number, chunk in enumerate(chunks):
            total = chunk[0].clone()
            for part in chunk[1:]:
                total += part
            result[k] = total if number == 0 else result[k] + total
    return result


# Widths: in units of 16 bytes, and element by element. Uses: none, one, around a chunk, several chunks, the last of
# them short; rows of several chunks side by side. The order mixes the rows.
@pytest.mark.parametrize("width", [8, 3])
@pytest.mark.parametrize("kind", ["table", "few visual rows", "visual rows, most used once"])
@GPU_KERNELS
def test_order_of_sums(backend, device, kind, width):
    uses = [65, 1, 200, 64, 0, 128, 2]
    uses += [1] * 60 if kind.endswith("once") else []
    generator = torch.Generator().manual_seed(3)
    rows = torch.repeat_interleave(torch.arange(len(uses)), torch.tensor(uses))
    rows = rows[torch.randperm(len(rows), generator=generator)]
    flipped = kind != "table"
    index = -1 - rows if flipped else rows
    assert row_gradients.mostly_once(index, flipped, len(uses)) == kind.endswith("once")
    used = torch.randn(len(uses), width, generator=generator).to(device).requires_grad_()
    sources = (used[:1].detach(), used) if flipped else (used, used[:1].detach())
    x = template_concat(*sources, index.to(device), backend=backend)
    upstream = like(x)
    (gradient,) = torch.autograd.grad(x, used, upstream)
    assert torch.equal(gradient.cpu(), in_order(upstream.cpu(), index, flipped, len(uses)))


@KERNELS
def test_unchecked_row_that_is_not_there_poisons_its_position(backend, device, monkeypatch):
    monkeypatch.setattr("reca_kernels.checks.index_inside", lambda *_: None)
    (table, visual, position, _), src, (where, _) = problem(16, device=device)
    src, where = src.clone(), where.clone()
    src[0, 1], src[1, 2], where[0, 4] = 11, -7, 9
    bad = torch.zeros(2, 9, dtype=torch.bool, device=device)
    bad[0, 1] = bad[1, 2] = bad[0, 4] = True
    x = template_concat(table, visual, src, adds=[(position, where)], backend=backend)
    assert torch.equal(x.isnan().all(-1), bad) and torch.equal(x.isnan().any(-1), bad)
    for gradient in torch.autograd.grad(x, (table, visual, position), torch.ones_like(x)):
        assert gradient.isfinite().all()


@KERNELS
def test_many_tables_to_add(backend, device):
    (table, visual, *_), src, _ = problem(8, device=device)
    adds = [(like(table, seed).requires_grad_(), torch.full_like(src, seed % 3 - 1)) for seed in range(14)]
    got = template_concat(table, visual, src, adds=adds, backend=backend)
    want = template_concat(table, visual, src, adds=adds, backend="reference")
    torch.testing.assert_close(got, want)
    if backend == "cuda":
        with pytest.raises(ValueError, match="adds at most 14 tables, got 15; add some of them beforehand"):
            template_concat(table, visual, src, adds=[*adds, adds[0]], backend=backend)


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


@pytest.mark.parametrize("width", [37, 1100])
def test_every_instruction_set(isa, width):
    """Rows begin at any multiple of their elements, hence within a vector; nobody, one or several read them."""
    for dtype in DTYPES:
        test_against_fp64("cpu", "cpu", width, dtype, torch.int32)
    test_every_bit_is_copied("cpu", "cpu", torch.bfloat16)
    for dtype in DTYPES[1:]:
        test_other_dtypes_are_rounded_as_torch_rounds("cpu", "cpu", dtype, width)


@KERNELS
def test_second_derivative_says_what_to_do(backend, device):
    leaves, src, indices = problem(device=device)
    x = run(leaves, src, indices, backend=backend)
    (gradient,) = torch.autograd.grad(x.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@EVERYWHERE
def test_compiles_into_one_graph(backend, device):
    leaves, src, indices = problem(device=device)
    how = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(run, fullgraph=True, backend=how)(leaves, src, indices, backend=backend)
    plain = run(leaves, src, indices, backend=backend)
    assert torch.equal(compiled, plain)
    got, want = (torch.autograd.grad(x, leaves, like(x)) for x in (compiled, plain))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@KERNELS
def test_registered_ops(backend, device):
    (table, visual, position, kind), src, indices = problem(device=device)
    rows = [table, visual.detach().flatten(0, 1).requires_grad_(), position, kind]
    flat = [i.reshape(-1) for i in (src, *indices)]
    torch.library.opcheck(torch.ops.reca.template_concat.default, (rows, flat, torch.float32, backend))


def test_positions_sorted_by_row():
    index = torch.tensor([2, 0, -1, 2, 5, 3], dtype=torch.int32)
    by_row = row_gradients.by_row(index, False, 4)
    assert by_row.rows.tolist() == [-1, 0, 2, 2, 3, 5] and by_row.places.tolist() == [2, 1, 0, 3, 5, 4]
    assert by_row.starts.tolist() == [1, 2, 2, 4, 5]
    flipped = row_gradients.by_row(-1 - index, True, 4)
    assert all(torch.equal(a, b) for a, b in zip(by_row, flipped, strict=True))


# ---- what the Triton compiler made ----


def wide_launches():
    from reca_kernels.template_concat import triton as op

    src, width = torch.zeros(128, dtype=torch.int32), 2048
    for dtype in (torch.float32, torch.bfloat16):
        table, visual, grad = (torch.empty(rows, width, dtype=dtype) for rows in (16, 64, 128))
        sources = [(table, src, False), (visual, src, True), (table, src, False)]
        op.forward(sources[:2], dtype)
        op.forward(sources, dtype)
    op.backward(grad, src, False, len(table), table.dtype)
    op.backward(grad, src, True, len(visual), visual.dtype)


def narrow_launches():
    from reca_kernels.template_concat import triton as op

    src = torch.zeros(128, dtype=torch.int64)
    table, visual, grad = (torch.empty(rows, 37, dtype=torch.float16) for rows in (16, 64, 128))
    op.forward([(table, src, False), (visual, src, True), (table.float(), src, False)], torch.float16)
    op.backward(grad, src, False, len(table), table.dtype)
    op.backward(grad, src, True, len(visual), torch.float32)


def test_triton_kernels_move_16_bytes_at_a_time_without_spills():
    made = cubin.compiled(wide_launches)
    kernels = {"forward_kernel", "chunks_kernel", "rows_kernel", "mapped_kernel"}
    assert {m.kernel for m in made} == kernels | {"map_kernel"}
    for m in made:
        m.assert_lean(registers=128, loads=(128,) * (m.kernel in kernels), stores=(128,) * (m.kernel in kernels))


def test_triton_kernels_of_odd_widths_do_not_spill():
    for m in cubin.compiled(narrow_launches, (90,)):
        m.assert_lean(registers=128)


# ---- on a GPU ----


@pytest.mark.gpu
@ON_GPU
def test_more_than_2_31_elements(backend):
    length, width = 33_000, 65_600
    table = torch.randn(4, width, device="cuda", requires_grad=True)
    visual = torch.randn(4, width, device="cuda", requires_grad=True)
    src = torch.arange(length, device="cuda") % 8 - 4
    x = template_concat(table, visual, src, out_dtype=torch.bfloat16, backend=backend)
    assert x.numel() > 2**31
    for t in (0, 5, length - 5, length - 1):
        row = int(src[t])
        assert torch.equal(x[t], (table[row] if row >= 0 else visual[-1 - row]).bfloat16())
    gradients = torch.autograd.grad(x, (table, visual), torch.ones_like(x))
    assert all(bool((gradient == length // 8).all()) for gradient in gradients)


def step(leaves, src, indices, backend):
    x = run(leaves, src, indices, backend=backend)
    return [x, *torch.autograd.grad(x, leaves, like(x.detach()))]


def big_problem(device, seed=0):
    """Three samples of 700 positions; ids of which some are common, as in a template."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(device, torch.bfloat16).requires_grad_()  # noqa: E731
    leaves = draw(500, 256), draw(3, 300, 256), draw(700, 256), draw(2, 256)
    words = torch.randint(0, 20, (3, 400), generator=generator).square()
    src = torch.cat((words, -1 - torch.arange(900).view(3, 300)), 1)
    where = torch.arange(700).expand(3, 700)
    return leaves, src.to(device), [where.to(device), torch.where(src < 0, 1, -1).to(device)]


@pytest.mark.gpu
def test_both_gpu_backends_and_every_run_make_the_same_bits():
    first, *others = (step(*big_problem("cuda"), backend) for backend in ("cuda", "triton", "cuda", "triton"))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
@ON_GPU
def test_graph_capture(backend):
    leaves, src, indices = big_problem("cuda")
    upstream = like(run(leaves, src, indices, backend=backend).detach())

    def both():
        x = run(leaves, src, indices, backend=backend)
        return [x, *torch.autograd.grad(x, leaves, upstream)]

    graph, captured = capture(both)
    new_leaves, new_src, _ = big_problem("cuda", seed=1)
    with torch.no_grad():
        src.copy_(new_src)
        for old, new in zip(leaves, new_leaves, strict=True):
            old.copy_(new)
    graph.replay()
    want = step(leaves, src, indices, backend)
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.gpu
@ON_GPU
def test_two_streams(backend):
    problems = [big_problem("cuda", seed) for seed in (0, 1)]
    want = [step(*p, backend) for p in problems]
    got = on_streams([partial(step, *p, backend) for p in problems])
    assert all(torch.equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))


@pytest.mark.gpu
@needs_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    chosen = "(test_order_of_sums or test_dtypes_may_differ or test_rows_that_do_not_begin) and cuda-cuda"
    sanitize(tool, "-m", "pytest", "-q", __file__, "-k", chosen)


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
    for wrong, error in (([1.5, 2], TypeError), ([True], TypeError), (["a"], TypeError), ([2**31], ValueError)):
        with pytest.raises(error, match="must be integers|numbers in"):
            concat_plan([[TextSegment(wrong)]])
    assert len(concat_plan([[TextSegment([])]]).src) == 0
    with pytest.raises(ValueError, match="n >= 0 rows, got -3"):
        concat_plan([[VisualSegment(-3)]])
    with pytest.raises(ValueError, match="numbers in"):
        concat_plan([[TextSegment([-3])]])
    with pytest.raises(
        TypeError, match=r"sample 0: a segment must be .*, got \[1, 2\]; a plan takes a list of segments"
    ):
        concat_plan([TextSegment([1, 2])])
    with pytest.raises(ValueError, match="'packed', 'left' or 'right'"):
        concat_plan(SAMPLES, layout="center")
