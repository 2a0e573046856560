"""Both cross-entropies on a GPU: no waiting, streams, CUDA graphs, sizes beyond 32 bits, the compiler, the sanitizer.

Their numbers are tested in test_masked_cross_entropy.py and test_masked_linear_cross_entropy.py, on GPUs too.
"""

import pytest
import torch

from reca_kernels import masked_cross_entropy, masked_linear_cross_entropy
from reca_kernels.masked_cross_entropy import reference
from tests.kernels.backends import targets
from tests.kernels.cross_entropy import IGNORED, close, exact, logits_of, problem
from tests.kernels.on_gpu import capture, needs_sanitizer, sanitize

pytestmark = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(target.values[0], marks=target.marks)
        for target in targets("masked_linear_cross_entropy", reference=False)
        if target.values[1] == "cuda"
    ],
)


def both(leaves, labels, backend, room=None):
    """Loss and gradients of both forms, reduced and row by row."""
    hidden, weight, bias = leaves
    results = []
    for reduction in ("mean", "none"):
        loss = masked_cross_entropy(hidden @ weight.T, labels, reduction=reduction, backend=backend).sum()
        results += [loss, *torch.autograd.grad(loss, (hidden, weight))]
        loss = masked_linear_cross_entropy(
            hidden, weight, labels, bias, reduction=reduction, chunk_rows=100, max_labelled=room, backend=backend
        ).sum()
        results += [loss, *torch.autograd.grad(loss, leaves)]
    return [x.detach() for x in results]


def large(seed=3):
    return problem(rows=301, classes=1999, width=64, dtype=torch.bfloat16, seed=seed, device="cuda")


@BACKENDS
def test_nothing_waits_for_the_gpu(backend):
    leaves, labels = large()
    both(leaves, labels, backend, 250)  # compiles, and fills cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(leaves, labels, backend, 250)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
def test_runs_on_the_current_stream(backend):
    """The side stream sleeps before it writes the inputs: a kernel on another stream would read zeros."""
    leaves, labels = large()
    want = both(leaves, labels, backend, 250)
    late = [torch.zeros_like(x).requires_grad_() for x in leaves]
    late_labels = torch.full_like(labels, IGNORED)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for to, x in zip(late, leaves, strict=True):
                to.copy_(x)
        late_labels.copy_(labels)
        got = both(late, late_labels, backend, 250)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("room", [250, None], ids=["room for 250 rows", "room for all rows"])
@BACKENDS
def test_graph_replays_with_other_inputs(backend, room):
    leaves, labels = large()
    graph, captured = capture(
        lambda: both(leaves, labels, backend, room), lambda: both(leaves, labels, backend, room or len(labels))
    )
    others, other_labels = large(seed=4)
    with torch.no_grad():
        for to, x in zip(leaves, others, strict=True):
            to.copy_(x)
    labels.copy_(other_labels)
    graph.replay()
    for got, want in zip(captured, both(others, other_labels, backend, room or len(labels)), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-4)  # cuBLAS may choose another product


@BACKENDS
def test_same_bits_every_time(backend):
    leaves, labels = large()
    first, second = (both(leaves, labels, backend, 250) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BACKENDS
def test_more_than_2_31_logits(backend):
    """Show-o's 58498 classes, so many rows that the last ones begin beyond 2^31 elements; in place, 4.4 GB."""
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    classes = 58498
    rows = 2**31 // classes + 3
    row = torch.zeros(1, classes, dtype=torch.bfloat16, device="cuda").requires_grad_()
    labels = torch.full((rows,), IGNORED, device="cuda")
    some = torch.tensor([0, rows - 2, rows - 1], device="cuda")
    values = torch.randn(3, classes, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    labels[some] = torch.tensor([classes - 1, 0, 1234], device="cuda")
    worked = row.expand(rows, classes).clone()
    with torch.no_grad():
        worked[some] = values
    loss = masked_cross_entropy(worked, labels, inplace=True, backend=backend)
    loss.backward()
    (wide,) = exact([values])
    want = reference.masked_cross_entropy(wide, labels[some])
    close(loss.detach(), want.detach(), 1e-5)
    close(worked.detach()[some], torch.autograd.grad(want, wide)[0], 5e-3)
    assert not worked.detach()[1 : rows - 2].any()


@BACKENDS
def test_more_than_2_31_elements_of_hidden(backend):
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    width = 2048
    rows = 2**31 // width + 3
    hidden = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((rows,), IGNORED, device="cuda")
    some = torch.tensor([0, rows - 2, rows - 1], device="cuda")
    labels[some] = torch.tensor([5, 0, 63], device="cuda")
    generator = torch.Generator().manual_seed(0)
    hidden[some] = torch.randn(3, width, generator=generator).bfloat16().cuda()
    weight = (torch.randn(64, width, generator=generator) * 0.1).bfloat16().cuda().requires_grad_()
    hidden.requires_grad_()
    loss = masked_linear_cross_entropy(hidden, weight, labels, max_labelled=3, backend=backend)
    dx, dw = torch.autograd.grad(loss, (hidden, weight))
    wide = exact([hidden[some], weight])
    want = reference.masked_cross_entropy(wide[0] @ wide[1].T, labels[some])
    close(loss.detach(), want.detach(), 2e-2)
    for got, true in zip((dx[some], dw), torch.autograd.grad(want, wide), strict=True):
        close(got, true, 2e-2)
    assert not dx[1 : rows - 2].any()


@BACKENDS
def test_inductor(backend):
    """One graph for several numbers of rows."""

    def step(hidden, weight, bias, labels):
        head = masked_linear_cross_entropy(hidden, weight, labels, bias, max_labelled=len(labels), backend=backend)
        return head + masked_cross_entropy(hidden @ weight.T, labels, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (20, 33):
        leaves, labels = problem(rows=rows, classes=300, width=64, device="cuda")
        loss, want = compiled(*leaves, labels), step(*leaves, labels)
        close(loss.detach(), want.detach(), 1e-3)
        for got, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
            close(got, true, 1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@BACKENDS
def test_runs_on_the_tensors_device(backend):
    """Not on the current one."""
    leaves, labels = problem(device="cuda:1")
    logits = logits_of(leaves)
    loss = masked_cross_entropy(logits, labels, backend=backend)
    close(loss.detach(), reference.masked_cross_entropy(logits.detach(), labels), 1e-5)
    assert torch.autograd.grad(loss, logits)[0].any()
    hidden, weight, bias = leaves
    loss = masked_linear_cross_entropy(hidden, weight, labels, bias, backend=backend)
    close(loss.detach(), reference.masked_cross_entropy((hidden @ weight.T + bias).detach(), labels), 1e-3)
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, leaves))
    assert torch.cuda.current_device() == 0


SANITIZED = """
import torch
from reca_kernels import masked_cross_entropy, masked_linear_cross_entropy
from tests.kernels.cross_entropy import problem
for classes in (5, 1003, 9001):
    for dtype in (torch.float32, torch.bfloat16):
        leaves, labels = problem(rows=9, classes=classes, dtype=dtype, device="cuda")
        for options in ({}, {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-3}):
            logits = (leaves[0] @ leaves[1].T).detach()[:, 1:].requires_grad_()
            masked_cross_entropy(logits, labels.clamp(max=classes - 2), backend=BACKEND, **options).backward()
            masked_linear_cross_entropy(
                *leaves[:2], labels, leaves[2], chunk_rows=4, max_labelled=8, backend=BACKEND, **options
            ).backward()
torch.cuda.synchronize()
"""


@needs_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@BACKENDS
def test_sanitizer(backend, tool):
    sanitize(tool, "-c", f"BACKEND = {backend!r}\n{SANITIZED}")
