"""Kernel ops: raw in eager mode, one node of every graph, one gradient for both."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from reca_kernels import (
    Philox,
    diffusion_loss,
    diffusion_schedule,
    flow_matching_loss,
    masked_cross_entropy,
    masked_linear_cross_entropy,
    native,
    template_concat,
)
from reca_kernels.kernel_op import kernel_op, once_differentiable

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.missing))
TABLE = diffusion_schedule()


def inputs(n, *shapes):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(shape, generator=g) for shape in shapes]


def address(n):
    return Philox(torch.tensor(7), torch.arange(n) + 3, 1)


def labels(n):
    return torch.arange(n) % 9 - 1  # the first carries none


def flow(pred, x0, t, ids):
    return flow_matching_loss(pred, x0, t, Philox(torch.tensor(7), ids, 1), backend="cpu", reduction="sample").sum()


def diffusion(out, x0, t, ids):
    return diffusion_loss(out, x0, t, Philox(torch.tensor(7), ids, 1), TABLE, backend="cpu")


# name -> (function, n -> its arguments: those that learn, others)
OPS = {
    "cross-entropy": (
        lambda z, y: masked_cross_entropy(z, y, ignore_index=-1, backend="cpu"),
        lambda n: (inputs(n, (n, 9)), [labels(n)]),
    ),
    "linear": (
        lambda h, w, y: masked_linear_cross_entropy(h, w, y, ignore_index=-1, backend="cpu"),
        lambda n: (inputs(n, (n, 8), (9, 8)), [labels(n)]),
    ),
    "linear-none": (
        lambda h, w, y: masked_linear_cross_entropy(h, w, y, ignore_index=-1, reduction="none", backend="cpu").sum(),
        lambda n: (inputs(n, (n, 8), (9, 8)), [labels(n)]),
    ),
    "linear-bound": (
        lambda h, w, y: masked_linear_cross_entropy(
            h, w, y, ignore_index=-1, reduction="none", max_labelled=h.shape[0] - 1, backend="cpu"
        ).sum(),
        lambda n: (inputs(n, (n, 8), (9, 8)), [labels(n)]),
    ),
    "flow": (flow, lambda n: (inputs(n, (n, 3, 4, 4)), [*inputs(n, (n, 3, 4, 4), (n,)), torch.arange(n)])),
    "diffusion": (
        diffusion,
        lambda n: (inputs(n, (n, 16)), [*inputs(n, (n, 8)), torch.arange(n) * 90, torch.arange(n)]),
    ),
    "concat": (
        lambda rows, visual, src: template_concat(rows, visual, src, adds=[(rows, src)], backend="cpu").square().sum(),
        lambda n: (inputs(n, (9, 8), (4, 8)), [torch.arange(n) % 13 - 4]),
    ),
}  # fmt: skip


@pytest.fixture(params=list(OPS))
def op(request):
    torch._dynamo.reset()
    return OPS[request.param]


def differentiated(function, learning, others):
    leaves = [x.clone().requires_grad_() for x in learning]
    loss = function(*(x * 1 for x in leaves), *others)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_loss_and_gradient_equal_eager(op, dynamic):
    function, arguments = op
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (4, 12) if dynamic else (4,):
        assert_equal(differentiated(compiled, *arguments(n)), differentiated(function, *arguments(n)))


@pytest.mark.parametrize("op", ["linear", "diffusion"], indirect=True)
def test_compiled_by_inductor(op):
    function, arguments = op
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (4, 12):
        torch.testing.assert_close(differentiated(compiled, *arguments(n)), differentiated(function, *arguments(n)))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_checkpoint_unpacks_what_was_saved_once(op, create_graph):
    function, arguments = op
    learning, others = arguments(4)
    leaves = [x.clone().requires_grad_() for x in learning]
    loss = checkpoint(lambda *x: function(*x, *others), *leaves, use_reentrant=False)
    gradients = torch.autograd.grad(loss, leaves, create_graph=create_graph)
    assert_equal((loss, *gradients), differentiated(function, learning, others))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_can_be_trained(op, strict):
    function, arguments = op
    learning, others = arguments(4)

    class Module(torch.nn.Module):
        def forward(self, *x):
            return function(*x)

    traced = tuple(x.clone().requires_grad_() for x in learning)
    program = torch.export.export(Module(), (*traced, *others), strict=strict).module()
    assert_equal(differentiated(program, learning, others), differentiated(function, learning, others))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "op", ["cross-entropy", "linear", "linear-bound", "flow", "diffusion", "concat"], indirect=True
)
def test_an_exported_program_takes_other_sizes(op, strict):
    """A batch whose len() was asked for was a constant of the program, and so was max_labelled."""
    function, arguments = op
    (learning, others), (more, other) = arguments(4), arguments(12)

    class Module(torch.nn.Module):
        def forward(self, *x):
            return function(*x)

    traced = [*(x.clone().requires_grad_() for x in learning), *others]
    sizes = [(a.shape, b.shape) for a, b in zip(traced, [*more, *other], strict=True)]
    differs = [{0: torch.export.Dim.DYNAMIC} if a != b else None for a, b in sizes]
    program = torch.export.export(Module(), tuple(traced), dynamic_shapes=(tuple(differs),), strict=strict).module()
    assert_equal(differentiated(program, more, other), differentiated(function, more, other))


@pytest.mark.parametrize("loss", ["flow", "diffusion"])
def test_the_mean_of_an_empty_batch_is_0_in_an_exported_program(loss):
    """torch.export replaced max(n, 1) by n."""

    class Module(torch.nn.Module):
        def forward(self, x, t):
            if loss == "flow":
                return flow_matching_loss(x, x, t, torch.zeros_like(x))
            x = x.flatten(1)
            return diffusion_loss(torch.cat((x, x), 1), x, t.long(), torch.zeros_like(x), TABLE)

    size = {0: torch.export.Dim("batch", min=0, max=64)}
    program = torch.export.export(Module(), (torch.ones(5, 2, 2, 2), torch.zeros(5)), dynamic_shapes=(size, size))
    for n in (0, 1, 4):
        x, t = torch.ones(n, 2, 2, 2), torch.zeros(n)
        assert torch.equal(program.module()(x, t), Module()(x, t)) and (n > 0 or Module()(x, t) == 0)


def test_one_graph_for_any_bound():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = lambda h, w, y, most: masked_linear_cross_entropy(h, w, y, ignore_index=-1, max_labelled=most)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for most in (8, 9, 11):
        h, w = inputs(0, (9, 8), (9, 8))
        assert_equal(
            differentiated(compiled, [h, w], [labels(9), most]), differentiated(loss, [h, w], [labels(9), most])
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_gradients_of_a_batch_under_vmap(how):
    def loss(z):
        return masked_cross_entropy(z, labels(4), ignore_index=-1, backend="cpu")

    both = torch.stack(inputs(0, (4, 9), (4, 9))).requires_grad_()
    run = torch.func.vmap(loss)
    run = torch.compile(run, backend=how, fullgraph=True) if how != "eager" else run
    (gradient,) = torch.autograd.grad(run(both).sum(), both)
    want = [torch.autograd.grad(loss(z), z)[0] for z in both.detach().requires_grad_().unbind()]
    assert torch.equal(gradient, torch.stack(want))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_of_a_batch_of_linear_losses_under_vmap(reduction, trained):
    hidden, weight = inputs(0, (3, 4, 8), (9, 8))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]

    def loss(h):
        options = {"ignore_index": -1, "reduction": reduction, "backend": "cpu"}
        return masked_linear_cross_entropy(h, leaves[1], labels(4), **options).sum()

    asked = leaves[: 1 + trained]
    found = torch.autograd.grad(torch.func.vmap(loss)(hidden).sum(), asked)
    want = torch.autograd.grad(sum(map(loss, hidden.unbind())), asked)
    for got, exact in zip(found, want, strict=True):
        torch.testing.assert_close(got, exact)


def test_a_derivative_of_torch_func_inside_a_graph_is_refused():
    def loss(z):
        return masked_cross_entropy(z, labels(4), ignore_index=-1, backend="cpu")

    with pytest.raises(RuntimeError):
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(inputs(0, (4, 9))[0])


def test_an_exported_program_without_a_gradient_is_not_trained_in_silence():
    function, arguments = OPS["linear"]
    learning, others = arguments(4)

    class Module(torch.nn.Module):
        def forward(self, *x):
            return function(*x)

    program = torch.export.export(Module(), (*learning, *others)).module()
    assert torch.equal(program(*learning, *others), function(*learning, *others))
    with pytest.raises(RuntimeError, match="trace it again"):
        differentiated(program, learning, others)


def test_an_exported_program_may_be_frozen_in_part():
    function, arguments = OPS["linear"]
    (hidden, weight), others = arguments(4)

    class Module(torch.nn.Module):
        def forward(self, *x):
            return function(*x)

    traced = tuple(x.clone().requires_grad_() for x in (hidden, weight))
    program = torch.export.export(Module(), (*traced, *others)).module()
    grads = [torch.autograd.grad(run(hidden, leaf, *others), leaf)[0] for run in (program, function)
             for leaf in [weight.clone().requires_grad_()]]  # fmt: skip
    assert torch.equal(*grads)


def test_second_derivatives_are_refused_whatever_is_asked_for(op):
    """Torch's own once_differentiable gives None here, which allow_unused takes for 0."""
    function, arguments = op
    learning, others = arguments(4)
    leaves = [x.requires_grad_() for x in learning]
    gradients = torch.autograd.grad(function(*leaves, *others), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradients[0].sum(), leaves, allow_unused=True)


# ---- a toy op: its results, its gradient, and what it may return ----


@pytest.fixture(scope="module")
def toy():
    @kernel_op(
        "toy(Tensor[] many, Tensor one, float by) -> (Tensor, Tensor)",
        lambda many, one, by: (torch.empty_like(one), None),
    )
    def toy(many, one, by):
        return sum(many) * by + one, None

    def setup_context(ctx, inputs, output):
        many, _, ctx.by = inputs
        ctx.count = len(many)
        ctx.save_for_backward(*many)

    def backward(ctx, grad, _):
        return [grad * ctx.by] * ctx.count, grad

    toy.register_autograd(backward, setup_context=setup_context, of=["many", "one"])

    @kernel_op("toy_same(Tensor x) -> Tensor", lambda x: torch.empty_like(x))
    def same(x):
        return x

    return toy, same


@pytest.mark.parametrize("plain", [True, False])
def test_a_list_and_a_tensor_get_gradients(toy, plain):
    many, one = [torch.ones(3, requires_grad=True) for _ in range(2)], torch.ones(3, requires_grad=True)
    out, nothing = toy[0](plain, many, one, 2.0)
    assert out.tolist() == [5.0] * 3 and (nothing is None if plain else nothing.numel() == 0)
    out.sum().backward()
    assert [x.grad.tolist() for x in (*many, one)] == [[2.0] * 3, [2.0] * 3, [1.0] * 3]


def test_a_registered_op_returns_memory_of_its_own(toy):
    x = torch.ones(3)
    assert toy[1](True, x) is x
    assert toy[1](False, x).data_ptr() != x.data_ptr()
    torch.library.opcheck(torch.ops.reca.toy_same, (x,))


def test_an_op_without_a_gradient_is_not_differentiated_in_silence(toy):
    with pytest.raises(RuntimeError, match="no second derivative"):
        toy[1](False, torch.ones(3, requires_grad=True)).sum().backward()


def test_once_differentiable_costs_nothing_without_create_graph():
    with torch.no_grad():
        backward = once_differentiable("toy")(lambda ctx, grad: (grad,))
        grad = torch.ones(1, requires_grad=True)
        assert backward(None, grad)[0] is grad  # and ctx.saved_tensors is not asked for


def test_the_import_and_an_eager_op_leave_the_compiler_out():
    """torch._dynamo takes longer to import than this package, in every process."""
    code = (
        "import sys, torch, reca_kernels\n"
        "logits = torch.ones(2, 3, requires_grad=True)\n"
        "reca_kernels.masked_cross_entropy(logits, torch.tensor([0, 1])).backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
