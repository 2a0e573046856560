"""Arguments of ops: any sizes (0 too), dtypes, places in memory, subclasses and modes, indices out of range.

What fits gives what the definition gives in fp64, and its gradients; what does not raises an error of ours. Nothing
ends the process, and nothing that stands where no label points to reaches anything.
"""

import contextlib
import os
import re

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from reca_kernels import (
    AttentionSpan as Span,
)
from reca_kernels import (
    Philox,
    attention,
    attention_plan,
    diffusion_add_noise,
    diffusion_loss,
    diffusion_schedule,
    flow_matching_add_noise,
    flow_matching_loss,
    masked_cross_entropy,
    masked_linear_cross_entropy,
    native,
    philox_normal,
    philox_uniform,
    template_concat,
)
from reca_kernels.attention import reference as attention_definition
from reca_kernels.philox import reference as philox_definition
from tests.fuzz.bounds import counted, fewer

BACKENDS = ["reference"] + ["cpu"] * (native.module is not None) * 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of results against fp64: products and sums of a few dozen terms, rounded to the dtype. Values are of order 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
IGNORED = -100
SIZES = st.integers(0, 9)
JUNK = st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")])


class Plain(torch.Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES = {
    "none": contextlib.nullcontext,
    "functions": Functions,
    "dispatches": Dispatches,
    "device": lambda: torch.device("meta"),  # a default that kernels must not take for their buffers
    "dual level": forward_ad.dual_level,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
}


def values(draw, *shape, dtype=torch.float32):
    """Of order 1, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(shape, generator=generator).to(dtype)


def placed(draw, x):
    """The same values elsewhere in memory, or as another kind of tensor."""
    how = draw(st.sampled_from(["as it is"] * 3 + ["offset", "steps", "transposed", "negated", "subclass", "padded"]))
    if how == "offset":
        shift = draw(st.integers(1, 9))
        room = torch.zeros(x.numel() + shift, dtype=x.dtype)
        room[shift:] = x.reshape(-1)
        return room[shift:].view(x.shape)
    if how == "steps" and x.ndim:
        room = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        room[..., ::2] = x
        return room[..., ::2]
    if how == "padded" and x.ndim:
        return torch.cat((x, torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)), -1)[..., : x.shape[-1]]
    if how == "transposed" and x.ndim > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "negated" and x.is_floating_point():
        return (-x)._neg_view()
    if how == "subclass":
        return x.as_subclass(Plain)
    return x


def leaf(draw, x):
    x = placed(draw, x)
    return x.detach().requires_grad_() if draw(st.booleans()) else x


def integers(draw, low, high, *shape):
    found = draw(st.lists(st.integers(low, high), min_size=(n := torch.Size(shape).numel()), max_size=n))
    return placed(draw, torch.tensor(found, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(shape))


def wide(x):
    """As fp64, with a gradient where x wants one."""
    return x.detach().as_subclass(torch.Tensor).resolve_neg().double().requires_grad_(x.requires_grad)


def compare(draw, run, definition, leaves, tolerance, rows=None):
    """run(*leaves) against definition(*leaves in fp64), and their gradients; rows: whose upstream gradients count."""
    doubles = [wide(x) for x in leaves]
    want = definition(*doubles)
    with MODES[draw(st.sampled_from(sorted(MODES)))]():
        got = run(*leaves)
    assert got.shape == want.shape and torch.isfinite(want).all()
    close(got, want, tolerance)
    wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
    assert got.requires_grad == bool(wanted)
    if not wanted:
        return
    up = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theirs = torch.autograd.grad(want, [doubles[i] for i in wanted], up, allow_unused=True)
    for again in (True, False):  # what the first pass gives away has to be made again
        ours = torch.autograd.grad(got, [leaves[i] for i in wanted], up.to(got.dtype), retain_graph=again)
        for i, g, true in zip(wanted, ours, theirs, strict=True):
            assert g.shape == leaves[i].shape and g.dtype == leaves[i].dtype
            close(g, torch.zeros_like(doubles[i]) if true is None else true, tolerance)


def close(got, want, tolerance):
    got = got.detach().as_subclass(torch.Tensor).double()
    assert (got - want.detach()).norm() <= tolerance * (want.detach().norm() + 1), (got, want)


def refused(op, run):
    """An error in our words, and no other."""
    try:
        run()
    except (ValueError, TypeError, RuntimeError) as error:
        assert re.match(rf"{op}|attention_plan|sample_ids", str(error)), error
        return
    raise AssertionError(f"{op} took what does not fit")


def labels_of(draw, rows, classes):
    """Some ignored, and (labels, whether all are in range)."""
    out = draw(st.booleans()) and draw(st.booleans()) and rows > 0
    labels = integers(draw, 0, classes - 1, rows)
    ignored = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    labels = torch.where(torch.tensor(ignored, dtype=torch.bool), IGNORED, labels)
    if out:
        labels[draw(st.integers(0, rows - 1))] = draw(st.sampled_from([-1, classes, classes + 1, 2**31 - 1]))
    return labels, not out


def junk_in_ignored(draw, x, labels):
    junk = draw(JUNK)
    with torch.no_grad():
        return torch.where((labels == IGNORED).as_subclass(torch.Tensor)[:, None], junk, x).to(x.dtype)


def options_of(draw):
    return {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 1e-3])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


@fewer(0.25)
@given(st.data())
def test_masked_cross_entropy(data):
    draw = data.draw
    rows, classes, dtype = draw(SIZES), draw(st.integers(1, 40)), draw(st.sampled_from(DTYPES))
    labels, fits = labels_of(draw, rows, classes)
    logits = leaf(draw, junk_in_ignored(draw, values(draw, rows, classes, dtype=dtype), labels))
    options, backend = options_of(draw), draw(st.sampled_from(BACKENDS))
    with counted("cross-entropies"):
        if not fits:
            return refused("masked_cross_entropy", lambda: masked_cross_entropy(logits, labels, backend=backend))
        compare(
            draw,
            lambda z: masked_cross_entropy(z, labels, backend=backend, **options),
            lambda z: masked_cross_entropy(z, labels, backend="reference", **options),
            [logits],
            TOLERANCE[dtype],
        )


@fewer(0.25)
@given(st.data())
def test_masked_linear_cross_entropy(data):
    draw = data.draw
    rows, classes, width, dtype = draw(SIZES), draw(st.integers(1, 40)), draw(SIZES), draw(st.sampled_from(DTYPES))
    labels, fits = labels_of(draw, rows, classes)
    hidden = leaf(draw, junk_in_ignored(draw, values(draw, rows, width, dtype=dtype), labels))
    weight, bias = (leaf(draw, values(draw, *shape, dtype=dtype)) for shape in ((classes, width), (classes,)))
    tensors = [hidden, weight, bias] if draw(st.booleans()) else [hidden, weight]
    options, backend = options_of(draw), draw(st.sampled_from(BACKENDS))
    room = draw(st.sampled_from([None, rows, rows + 3]))
    more = {"chunk_rows": draw(st.sampled_from([None, 1, 3])), "max_labelled": room, "backend": backend}

    def run(h, w, b=None):
        return masked_linear_cross_entropy(h, w, labels, b, **options, **more)

    with counted("heads"):
        if not fits:
            return refused("masked_linear_cross_entropy", lambda: run(*tensors))
        compare(
            draw,
            run,
            lambda h, w, b=None: masked_linear_cross_entropy(h, w, labels, b, backend="reference", **options),
            tensors,
            TOLERANCE[dtype] * (2 if backend == "reference" else 1),  # logits in the dtype of the weight
        )


@fewer(0.25)
@given(st.data())
def test_template_concat(data):
    draw = data.draw
    width, dtypes = draw(SIZES), [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    counts = [draw(st.integers(1, 6)) for _ in range(3)]
    shape = draw(st.sampled_from([(0,), (5,), (2, 3), (2, 0), (11,)]))
    fits = draw(st.integers(0, 4)) > 0 or torch.Size(shape).numel() == 0
    src = integers(draw, -counts[1], counts[0] - 1, *shape)
    index = integers(draw, -1, counts[2] - 1, *shape)
    if not fits:
        src = src.clone()
        src[(0,) * src.ndim] = draw(st.sampled_from([counts[0], -counts[1] - 1, 2**31 - 1, -(2**31)]))
    tensors = [leaf(draw, values(draw, n, width, dtype=t)) for n, t in zip(counts, dtypes, strict=True)]
    added = draw(st.booleans())
    if not added:
        tensors.pop()
    backend = draw(st.sampled_from(BACKENDS))

    def run(table, visual, rows=None, backend=backend, dtype=None):
        adds = [] if rows is None else [(rows, index)]
        return template_concat(table, visual, src, adds=adds, backend=backend, out_dtype=dtype)

    with counted("concatenations"):
        if not fits:
            return refused("template_concat", lambda: run(*tensors))
        compare(
            draw,
            run,
            lambda *rows: run(*rows, backend="reference", dtype=torch.float64),
            tensors,
            max(TOLERANCE[t] for t in dtypes[: len(tensors)]),
        )


def address_of(draw, count):
    """Any of the 2^64 seeds and ids."""
    whole = st.integers(-(2**63), 2**63 - 1)
    ids = torch.tensor(draw(st.lists(whole, min_size=count, max_size=count)), dtype=torch.int64)
    return Philox(torch.tensor(draw(whole)), placed(draw, ids), draw(st.integers(0, 255)))


@fewer(0.25)
@given(st.data())
def test_philox(data):
    draw = data.draw
    address, n, backend = address_of(draw, draw(SIZES)), draw(st.integers(0, 70)), draw(st.sampled_from(BACKENDS))
    bare = Philox(*(x.as_subclass(torch.Tensor) for x in address[:2]), address.stream)
    with counted("rng"), MODES[draw(st.sampled_from(sorted(MODES)))]():
        got = [draw_it(address, n, backend=backend) for draw_it in (philox_uniform, philox_normal)]
    for ours, definition in zip(got, (philox_definition.philox_uniform, philox_definition.philox_normal), strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor).view(torch.int32), definition(*bare, n).view(torch.int32))
    refused("philox", lambda: philox_uniform(address._replace(stream=256), n))


@fewer(0.25)
@given(st.data())
def test_flow_matching(data):
    draw = data.draw
    patch, channels, dtype = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 5)), draw(st.sampled_from(DTYPES))
    sizes = [(patch * draw(st.integers(0, 3)), patch * draw(st.integers(0, 3))) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        size, sizes = sizes[0], sizes[: draw(st.integers(0, 3))]
        x0 = placed(draw, values(draw, len(sizes), channels, *size, dtype=dtype))
    else:
        x0 = [placed(draw, values(draw, channels, *size, dtype=dtype)) for size in sizes]
    t = placed(draw, values(draw, len(sizes)).sigmoid())
    noise, backend = address_of(draw, len(sizes)), draw(st.sampled_from(BACKENDS))
    doubles = wide(x0) if isinstance(x0, torch.Tensor) else [wide(x) for x in x0]
    options = {"patch": patch, "reduction": draw(st.sampled_from(["mean", "sum", "sample"]))}
    if draw(st.booleans()):
        options["weight"] = torch.tensor([draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in sizes])
    with counted("flows"):
        x_t = flow_matching_add_noise(x0, t, noise, patch=patch, backend=backend)
        close(x_t, flow_matching_add_noise(doubles, wide(t), noise, patch=patch, backend="reference"), TOLERANCE[dtype])
        pred = leaf(draw, values(draw, *x_t.shape, dtype=draw(st.sampled_from(DTYPES))))
        compare(
            draw,
            lambda p: flow_matching_loss(p, x0, t, noise, backend=backend, **options),
            lambda p: flow_matching_loss(p, doubles, wide(t), noise, backend="reference", **options),
            [pred],
            max(TOLERANCE[pred.dtype], TOLERANCE[dtype]),
        )
        refused("flow_matching", lambda: flow_matching_loss(pred[..., :0, None], x0, t, noise, patch=patch))


@fewer(0.25)
@given(st.data())
def test_diffusion_loss(data):
    draw = data.draw
    samples, count, channels = draw(st.integers(1, 5)), draw(SIZES), draw(st.integers(1, 20))
    x0 = placed(draw, 0.5 * values(draw, samples, channels))
    t, rows = integers(draw, 0, 999, count), integers(draw, 0, samples - 1, count)
    fits = count == 0 or draw(st.integers(0, 4)) > 0
    if not fits:
        t, rows = t.clone(), rows.clone()
        draw(st.sampled_from([t, rows]))[-1] = draw(st.sampled_from([-1, 1000, 2**31 - 1]))
    dtype = draw(st.sampled_from(DTYPES))
    out = leaf(draw, (0.3 * values(draw, count, 2 * channels)).to(dtype))
    noise, backend, table = address_of(draw, count), draw(st.sampled_from(BACKENDS)), diffusion_schedule()
    options = {"rows": rows, "backend": backend}
    with counted("diffusions"):
        if not fits:
            refused("diffusion_loss", lambda: diffusion_add_noise(x0, t, noise, table, **options))
            return refused("diffusion_loss", lambda: diffusion_loss(out, x0, t, noise, table, **options))
        options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
        compare(
            draw,
            lambda o: diffusion_loss(o, x0, t, noise, table, **options),
            lambda o: diffusion_loss(o, wide(x0), t, noise, table, **options | {"backend": "reference"}),
            [out],
            TOLERANCE[dtype],
        )


@fewer(0.25)
@given(st.data())
def test_attention(data):
    draw = data.draw
    runs = st.tuples(st.integers(0, 4), st.sampled_from(["causal", "full", "noise", "pad"])).map(lambda run: Span(*run))
    plan = attention_plan(draw(st.lists(st.lists(runs, min_size=1, max_size=4), min_size=1, max_size=3)))
    rows, heads = sum(plan.query_sizes), draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    hidden = torch.tensor(
        [run.mode in ("noise", "pad") for s in plan.samples for run in s for _ in range(run.length)], dtype=torch.bool
    )
    junk, impl = draw(JUNK), draw(st.sampled_from([None, "sdpa", "dense"]))
    q, k, v = (values(draw, rows, n, 8) for n in (heads[0], heads[1], heads[1]))
    want = attention_definition.attention(q.double(), k.double(), v.double(), plan)
    q, k, v = (placed(draw, torch.where(hidden[:, None, None], junk, x) if junk else x) for x in (q, k, v))
    with counted("attentions"), MODES[draw(st.sampled_from(sorted(MODES)))]():
        got = attention(q, k, v, plan, impl=impl)
    seen = ~hidden if junk else torch.ones_like(hidden)
    close(got[seen], want[seen], 1e-4)
    padding = torch.tensor(
        [run.mode == "pad" for s in plan.samples for run in s for _ in range(run.length)], dtype=torch.bool
    )
    assert not got[padding].any()


@fewer(0.25)
@given(st.data())
def test_what_is_no_argument(data):
    """Wrong kinds, numbers of dimensions, dtypes and lengths, one at a time."""
    draw = data.draw
    labels, logits, weight = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 9), torch.zeros(9, 9)
    wrong = draw(
        st.sampled_from(
            [None, 3, "x", [1.0], logits.to_sparse(), logits.long(), logits[0], logits[:3], logits[None],
             logits.to("meta"), logits.to(torch.complex64), torch.nested.nested_tensor([logits], layout=torch.jagged)]
        )
    )  # fmt: skip
    calls = {
        "masked_cross_entropy": [(masked_cross_entropy, [logits, labels])],
        "masked_linear_cross_entropy": [(masked_linear_cross_entropy, [logits, weight, labels])],
        "template_concat": [(template_concat, [weight, weight, labels])],
        "philox": [(lambda ids: philox_normal(Philox(torch.tensor(1), ids, 0), 4), [labels])],
    }
    name = draw(st.sampled_from(sorted(calls)))
    ((op, arguments),) = calls[name]
    place = draw(st.integers(0, len(arguments) - 1))
    with counted("mistakes"):
        changed = [wrong if i == place else x for i, x in enumerate(arguments)]
        try:
            result = op(*changed)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            assert len(str(error)) > 10 and os.linesep * 5 not in str(error)
        else:
            assert isinstance(wrong, torch.Tensor) and isinstance(result, torch.Tensor)
