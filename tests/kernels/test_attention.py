"""attention against its definition in fp64, on the layouts of the models and on random ones; plans; every impl."""

import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from reca_kernels import AttentionSpan as Span
from reca_kernels import attention, attention_plan, backend_report
from reca_kernels.attention import flash_functions, implementations, op, reference
from reca_kernels.attention import order as orders
from reca_kernels.attention import plan as plans
from reca_kernels.attention.implementations import IMPLS
from reca_kernels.attention.op import choose, dense_is_faster
from reca_kernels.attention.plan import MODES, query_groups, total

# Small samples of every layout: a batch of two, so that lengths differ.
LAYOUTS = {
    "show_o_t2i": [
        (Span(3, "pad"), Span(4), Span(9, "full")),
        (Span(0, "pad"), Span(7), Span(9, "full")),
    ],
    "show_o_i2t_clip": [
        (
            Span(2, "pad"),
            Span(3),
            Span(6, "full", visible_to_earlier=True),
            Span(5),
        ),
        (
            Span(0, "pad"),
            Span(3),
            Span(6, "full", visible_to_earlier=True),
            Span(7),
        ),
    ],
    "show_o_reca_clip": [
        (
            Span(1, "pad"),
            Span(2),
            Span(6, "full", visible_to_earlier=True),
            Span(5),
            Span(9, "full"),
            Span(1),
        ),
        (
            Span(0, "pad"),
            Span(2),
            Span(6, "full", visible_to_earlier=True),
            Span(6),
            Span(9, "full"),
            Span(1),
        ),
    ],
    "show_o_reca_vq": [
        (
            Span(0, "pad"),
            Span(1),
            Span(6, "full"),
            Span(5),
            Span(9, "full"),
        ),
        (
            Span(2, "pad"),
            Span(1),
            Span(6, "full"),
            Span(3),
            Span(9, "full"),
        ),
    ],
    "harmon_llm": [
        (Span(3), Span(8), Span(4), Span(0, "pad"), Span(5)),
        (Span(3), Span(8), Span(2), Span(2, "pad"), Span(5)),
    ],
    "harmon_mar": [(Span(11, "full"),), (Span(11, "full"),)],
    "open_uni": [
        (Span(4, "pad", cached=True), Span(9, cached=True), Span(6)),
        (Span(0, "pad", cached=True), Span(13, cached=True), Span(6)),
    ],
    "bagel_reca": [
        (Span(6, "full"), Span(5), Span(10, "noise")),
        (Span(4, "full"), Span(0), Span(8, "noise")),
    ],
    "bagel_target": [
        (Span(6, "full", cached=True), Span(5, cached=True), Span(10, "noise")),
        (Span(4, "full", cached=True), Span(8, "noise")),
    ],
    "bagel_edits": [
        (
            Span(3),
            Span(4, "noise"),
            Span(4, "full"),
            Span(2),
            Span(5, "noise"),
        ),
        (
            Span(6, "noise"),
            Span(2),
            Span(3, "full"),
            Span(1),
            Span(1, "noise"),
        ),
    ],
}
PADDED = [name for name in LAYOUTS if not name.startswith("bagel") and name != "open_uni"] + ["open_uni"]
FLASH = ["fa4", "fa3", "fa2"]
EXACT = ["sdpa", "dense", *FLASH, "varlen"]


def random_sample(chance, prefix):
    runs = [Span(chance.randint(0, 5), chance.choice(("causal", "full", "pad")), cached=True) for _ in range(prefix)]
    for _ in range(chance.randint(0, 6)):
        mode = chance.choice(MODES)
        runs.append(Span(chance.randint(0, 6), mode, mode in ("causal", "full") and chance.random() < 0.3))
    return tuple(runs)


RANDOM = {
    f"random_{seed}": [random_sample(random.Random(100 * seed + i), prefix=seed % 3) for i in range(1 + seed % 4)]
    for seed in range(24)
}


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
    """What the variable-length functions promise: sequence by sequence; causal: the last row sees the last key."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert int(cu_q[-1]) == q.shape[0] and int(cu_k[-1]) == k.shape[0] == v.shape[0]
    assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    outs = []
    for i in range(len(cu_q) - 1):
        ends = (cu_q[i : i + 2], cu_k[i : i + 2], cu_k[i : i + 2])
        one = [x[a:b].transpose(0, 1)[None] for x, (a, b) in zip((q, k, v), ends, strict=True)]
        rows, keys = one[0].shape[2], one[1].shape[2]
        sees = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if causal else None
        out = F.scaled_dot_product_attention(*one, attn_mask=sees, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture(autouse=True)
def varlen_functions(monkeypatch):
    """flash-attn 2 and torch's varlen_attn in plain torch, with the arguments that their documentation names."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        calls.append(("flash", causal, deterministic))
        return fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert window_size in ((-1, 0), (-1, -1))
        calls.append(("varlen", window_size == (-1, 0), None))
        return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0))

    calls = []
    if not torch.cuda.is_available():
        for module in flash_functions.MODULES.values():
            package = types.ModuleType(module)
            package.flash_attn_varlen_func = flash_attn_varlen_func
            monkeypatch.setitem(sys.modules, module, package)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    forget()
    yield calls
    forget()


def forget():
    """What was found out about installed packages, and the choices that rest on it."""
    for kept in (flash_functions.found, flash_functions.varlen_parameters, choose):
        kept.cache_clear()


def problem(samples, padded, heads=4, kv_heads=2, d=8, dtype=torch.float64, seed=0):
    """plan, (q, k, v) that require a gradient, and an upstream gradient."""
    plan = attention_plan(samples)
    generator = torch.Generator().manual_seed(seed)

    def rows(sizes, heads):
        shape = (len(sizes), sizes[0]) if padded else (sum(sizes),)
        return torch.randn(*shape, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = rows(plan.query_sizes, heads), rows(plan.key_sizes, kv_heads), rows(plan.key_sizes, kv_heads)
    return plan, (q, k, v), torch.randn(q.shape, generator=generator, dtype=torch.float64).to(dtype)


def run(name, plan, qkv, **options):
    """An impl by name, past the check of where it can run: on this machine flash functions are the fakes above."""
    return IMPLS[name](*qkv, plan, options.get("scale", qkv[0].shape[-1] ** -0.5), False)


def with_gradients(out, qkv, upstream):
    return out.detach(), *torch.autograd.grad(out, qkv, upstream)


def same(got, want, tolerance=1e-12):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert torch.allclose(g, w, rtol=0, atol=tolerance), float((g - w).abs().max())


CASES = [(name, False) for name in LAYOUTS] + [(name, True) for name in PADDED] + [(name, False) for name in RANDOM]


@pytest.mark.parametrize("name,padded", CASES)
@pytest.mark.parametrize("impl", EXACT)
def test_every_impl_is_the_definition(impl, name, padded):
    plan, qkv, upstream = problem({**LAYOUTS, **RANDOM}[name], padded)
    if not any(plan.groups):
        pytest.skip("nobody sees anything; see test_nobody_sees_anything")
    want = with_gradients(reference.attention(*qkv, plan), qkv, upstream)
    same(with_gradients(run(impl, plan, qkv), qkv, upstream), want)


@pytest.mark.parametrize("name,padded", CASES)
def test_sdpa_where_the_cpu_kernel_is_not_called_directly(name, padded):
    """As on GPUs and under transforms: by scaled_dot_product_attention and autograd."""
    plan, qkv, upstream = problem({**LAYOUTS, **RANDOM}[name], padded)
    if not any(plan.groups):
        pytest.skip("nobody sees anything; see test_nobody_sees_anything")
    want = with_gradients(reference.attention(*qkv, plan), qkv, upstream)
    with sdpa_kernel(SDPBackend.MATH):
        same(with_gradients(run("sdpa", plan, qkv), qkv, upstream), want)
    out, pull = torch.func.vjp(lambda *qkv: run("sdpa", plan, qkv), *(x.detach() for x in qkv))
    same([out, *pull(upstream)], want)


@pytest.mark.parametrize("name", ["bagel_reca", "show_o_reca_clip"])
def test_second_derivative_of_sdpa_is_an_error(name):
    plan, qkv, upstream = problem(LAYOUTS[name], False)
    first = torch.autograd.grad(run("sdpa", plan, qkv), qkv, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(x.square().sum() for x in first), qkv, allow_unused=True)


@pytest.mark.parametrize(
    "name,padded", [("show_o_reca_clip", True), ("show_o_reca_clip", False), ("bagel_reca", False)]
)
def test_cpu_keeps_nothing_but_its_arguments_its_output_and_log_sums(name, padded):
    plan, qkv, _ = problem(LAYOUTS[name], padded, dtype=torch.float32)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run("sdpa", plan, qkv)
    others = [x for at, x in kept.items() if at not in {y.untyped_storage().data_ptr() for y in (*qkv, out)}]
    assert sum(x.untyped_storage().nbytes() for x in others) <= out.nbytes // out.shape[-1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", [*LAYOUTS, *RANDOM])
def test_flex_forward(name):
    plan, qkv, _ = problem({**LAYOUTS, **RANDOM}[name], padded=False)
    if not any(plan.groups):
        pytest.skip("nobody sees anything; see test_nobody_sees_anything")
    qkv = [x.detach() for x in qkv]  # it has no backward on CPUs
    same([run("flex", plan, qkv)], [reference.attention(*qkv, plan)])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_flex_in_a_graph(mode):
    plan, qkv, _ = problem(LAYOUTS["show_o_reca_clip"], padded=False)
    qkv = [x.detach() for x in qkv]
    graph = make_fx(lambda *qkv: run("flex", plan, qkv), tracing_mode=mode)(*map(torch.zeros_like, qkv))
    same([graph(*qkv)], [reference.attention(*qkv, plan)])
    same([run("flex", plan, qkv)], [reference.attention(*qkv, plan)])  # nothing of the graph was kept


@pytest.mark.parametrize("heads,kv_heads,d", [(1, 1, 64), (4, 4, 80), (6, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_torch(heads, kv_heads, d, dtype):
    """The error against fp64 is at most 1.5 times that of one masked attention in the same dtype."""
    plan, qkv, upstream = problem(LAYOUTS["show_o_reca_clip"], True, heads, kv_heads, d, dtype)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    exact = with_gradients(reference.attention(*wide, plan), wide, upstream.double())
    torchs = with_gradients(run("dense", plan, qkv), qkv, upstream)
    for name in ("sdpa", "fa2", "varlen"):
        for got, peer, want in zip(with_gradients(run(name, plan, qkv), qkv, upstream), torchs, exact, strict=True):
            tiny = (1e-6 if dtype == torch.float32 else 1e-4) * float(want.abs().max())
            assert got.dtype == dtype
            assert (got.double() - want).norm() <= 1.5 * (peer.double() - want).norm() + tiny * want.numel() ** 0.5


def test_scale():
    plan, qkv, _ = problem(LAYOUTS["bagel_reca"], False)
    same([attention(*qkv, plan, scale=0.3)], [reference.attention(*qkv, plan, scale=0.3)])
    assert not torch.allclose(attention(*qkv, plan), attention(*qkv, plan, scale=0.3))


@pytest.mark.parametrize("impl", EXACT)
def test_strided_rows_and_an_expanded_gradient(impl):
    """Adapters hand over transposed views, and a mean's gradient has stride 0."""
    plan, (q, k, v), _ = problem(LAYOUTS["show_o_reca_vq"], True)
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    upstream = torch.ones((), dtype=q.dtype).expand(q.shape)
    want = with_gradients(reference.attention(q, k, v, plan), (q, k, v), upstream)
    same(with_gradients(run(impl, plan, (q, k, v)), (q, k, v), upstream), want)


@pytest.mark.parametrize("impl", EXACT)
def test_channels_apart(impl):
    plan, qkv, upstream = problem(LAYOUTS["bagel_target"], False)
    spread = [torch.stack((x.detach(), -x.detach()), dim=-1)[..., 0].requires_grad_() for x in qkv]
    assert all(x.stride(-1) == 2 for x in spread)
    same(with_gradients(run(impl, plan, spread), spread, upstream), with_gradients(run(impl, plan, qkv), qkv, upstream))


@pytest.mark.parametrize("impl", ["sdpa", "fa2", "varlen"])
def test_padding_gives_nothing_and_takes_nothing(impl):
    """Rows of padding hold NaN, which reaches neither outputs nor gradients. (A mask multiplies; it cannot skip.)"""
    plan, qkv, upstream = problem(LAYOUTS["show_o_t2i"], True)
    clean = with_gradients(run(impl, plan, qkv), qkv, upstream)
    assert all((x[0, :3] == 0).all() for x in clean)
    with torch.no_grad():
        for x in (*qkv, upstream):
            x[0, :3] = torch.nan
    same(with_gradients(run(impl, plan, qkv), qkv, upstream), clean)


@pytest.mark.parametrize("held", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["noise", "pad"])
@pytest.mark.parametrize("impl", [None, "sdpa", "dense"])
@pytest.mark.parametrize("padded", [True, False], ids=["batch", "packed"])
def test_what_hidden_rows_hold_reaches_no_other_row(impl, mode, held, padded):
    """Neither outputs nor gradients of rows that do not attend to it; rows of noise themselves become NaN."""
    sample = [Span(3), Span(4, mode), Span(2, "full"), Span(3, "noise")]
    plan, qkv, upstream = problem([sample, sample], padded)
    others = torch.tensor([True] * 3 + [False] * 4 + [True] * 5).repeat(2)
    with torch.no_grad():
        upstream.flatten(0, -3)[~others] = 0
    clean = with_gradients(attention(*qkv, plan, impl=impl), qkv, upstream)
    with torch.no_grad():
        for x in qkv:
            x.flatten(0, -3)[~others] = held
    got = with_gradients(attention(*qkv, plan, impl=impl), qkv, upstream)
    same([x.flatten(0, -3)[others] for x in got], [x.flatten(0, -3)[others] for x in clean])
    own = got[0].flatten(0, -3)[~others]
    assert own.isnan().all() if mode == "noise" else not own.any()


def test_nobody_sees_anything():
    for samples in (
        [],
        [()],
        [(Span(3, "pad"),)],
        [(Span(3, cached=True),)],
        [(Span(0), Span(0, "full"))],
    ):
        plan, qkv, upstream = problem(samples, padded=False)
        out = attention(*qkv, plan)
        assert out.shape == qkv[0].shape and (out == 0).all()
        (gradient,) = torch.autograd.grad(out, qkv[:1], upstream)
        assert (gradient == 0).all()


# ---- a prefix that was computed before ----


@pytest.mark.parametrize("name,padded", [("bagel_target", False), ("open_uni", True), ("open_uni", False)])
def test_prefix_is_the_same_as_its_rows_in_k_and_v(name, padded):
    plan, (q, k, v), upstream = problem(LAYOUTS[name], padded)
    want = with_gradients(reference.attention(q, k, v, plan), (q, k, v), upstream)

    def cut(x):
        """Rows of cached runs, and the others."""
        if padded:
            return x.split((plan.cached_sizes[0], plan.query_sizes[0]), dim=1)
        sizes = [n for pair in zip(plan.cached_sizes, plan.query_sizes, strict=True) for n in pair]
        parts = x.split(sizes)
        return torch.cat(parts[::2]), torch.cat(parts[1::2])

    (old_k, new_k), (old_v, new_v) = (tuple(part.detach() for part in cut(x)) for x in (k, v))
    leaves = (q, new_k.requires_grad_(), new_v.requires_grad_())
    got = with_gradients(attention(*leaves, plan, prefix=(old_k, old_v)), leaves, upstream)
    same(got, (want[0], want[1], cut(want[2])[1], cut(want[3])[1]))
    assert old_k.grad is None and not old_k.requires_grad


def test_frozen_prefix_equals_the_whole_sequence():
    """Two layers of BAGEL's wiring: all rows, the understanding ones detached, against those run before, K/V kept."""
    generator = torch.Generator().manual_seed(0)
    width, heads, prefix, target = 16, 4, 9, 7
    weights = [torch.randn(4, width, width, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2)]
    learned = [w.clone().requires_grad_() for w in weights]
    x = torch.randn(prefix + target, width, generator=generator, dtype=torch.float64)
    runs = (Span(5, "full"), Span(4), Span(target, "noise"))
    kept = (Span(5, "full", cached=True), Span(4, cached=True), Span(target, "noise"))

    def project(w, x):
        q, k, v = (F.linear(x, m).view(-1, heads, width // heads) for m in w[:3])
        return q, k, v

    def whole():
        plan, h = attention_plan([runs]), x
        for frozen, w in zip(weights, learned, strict=True):
            old, new = project(frozen, h[:prefix].detach()), project(w, h[prefix:])
            out = attention(*(torch.cat(pair) for pair in zip(old, new, strict=True)), plan).flatten(1)
            h = h + torch.cat((F.linear(out[:prefix], frozen[3]).detach(), F.linear(out[prefix:], w[3])))
        return h[prefix:]

    def kept_prefix():
        plan, caches, h = attention_plan([runs[:2]]), [], x[:prefix]
        with torch.no_grad():
            for w in weights:
                q, k, v = project(w, h)
                caches.append((k, v))
                h = h + F.linear(attention(q, k, v, plan).flatten(1), w[3])
        plan, h = attention_plan([kept]), x[prefix:]
        for w, cache in zip(learned, caches, strict=True):
            h = h + F.linear(attention(*project(w, h), plan, prefix=cache).flatten(1), w[3])
        return h

    upstream = torch.randn(target, width, generator=generator, dtype=torch.float64)
    same(with_gradients(kept_prefix(), learned, upstream), with_gradients(whole(), learned, upstream), 1e-13)


# ---- the plan ----


@pytest.mark.parametrize("name", [*LAYOUTS, *RANDOM])
def test_plan_covers_every_pair_once(name):
    """Every row that sees anything is in one query group, and its keys there are those of the rules."""
    for sample in {**LAYOUTS, **RANDOM}[name]:
        want = reference.allowed(sample)
        got = torch.zeros_like(want)
        served = torch.zeros(len(want), dtype=torch.int64)
        for group in query_groups(sample):
            rows, keys = (torch.cat([torch.arange(*span) for span in spans]) for spans in (group.rows, group.keys))
            assert len(keys.unique()) == len(keys) == total(group.keys)
            block = torch.ones(len(rows), len(keys), dtype=torch.bool)
            got[rows[:, None], keys] = block.tril(len(keys) - len(rows)) if group.causal else block
            served[rows] += 1
        assert torch.equal(got, want)
        assert torch.equal(served, want.any(1).long())


@pytest.mark.parametrize("name", [*LAYOUTS, *RANDOM])
def test_calls_of_a_plan(name):
    plan = attention_plan({**LAYOUTS, **RANDOM}[name])
    order, _, calls = plan.calls
    rows = torch.arange(sum(plan.query_sizes)) if order is None else order
    assert len(rows.unique()) == len(rows) == sum(call.rows for call in calls)
    pairs = 0
    for call in calls:
        q, k = call.cu_q.diff(), call.cu_k.diff()
        assert int(q.min()) > 0 and int(k.min()) > 0  # no empty sequence ever reaches a kernel
        assert (k >= q).all() or not call.causal
        pairs += int((q * k - (q * (q - 1) // 2 if call.causal else 0)).sum())
    assert pairs == plan.pairs == sum(int(reference.allowed(sample).sum()) for sample in plan.samples)


def test_calls_of_the_layouts():
    """The number of calls, and whether keys are read where they are."""

    def shape(name):
        calls = attention_plan(LAYOUTS[name]).calls.calls
        return [("causal" if call.causal else "full", call.keys is None) for call in calls]

    assert shape("show_o_t2i") == [("full", True), ("causal", False)]
    assert shape("harmon_llm") == [("causal", True)]
    assert shape("harmon_mar") == [("full", True)]
    assert shape("open_uni") == [("causal", True)]
    assert shape("bagel_target") == [("full", True)]
    assert sorted(shape("bagel_reca")) == [("causal", False), ("full", False), ("full", True)]
    assert len(shape("show_o_reca_clip")) == 4


def test_whole_rows_are_not_gathered():
    for name in ("harmon_mar", "bagel_target"):
        order, unpadded, calls = attention_plan(LAYOUTS[name]).calls
        assert order is None and unpadded is None and calls[0].keys is None


def test_continued_causal_rows_share_a_query_group():
    """System prompt and text behind the image are one causal group, since the image is open to both."""
    (first, second) = query_groups((Span(3), Span(6, "full", visible_to_earlier=True), Span(5)))
    assert first == (((0, 3), (9, 14)), ((3, 9), (0, 3), (9, 14)), True)
    assert second == (((3, 9),), ((0, 9),), False)


def test_bagels_rule():
    """q sees k when k is not behind it or is in its full split, unless k is in another noise split."""
    for sample in LAYOUTS["bagel_edits"]:
        split = torch.cat([torch.full((span.length,), i) for i, span in enumerate(sample)])
        noise = torch.cat(
            [torch.full((span.length,), i if span.mode == "noise" else -1) for i, span in enumerate(sample)]
        )
        full = torch.cat([torch.full((span.length,), span.mode in ("full", "noise")) for span in sample])
        i = torch.arange(len(split))
        want = (i <= i[:, None]) | ((split == split[:, None]) & full)
        want &= ~((noise >= 0) & (noise != noise[:, None]))
        assert torch.equal(reference.allowed(sample), want)


def test_plans_are_kept():
    plan = attention_plan(LAYOUTS["bagel_reca"])
    assert attention_plan([list(sample) for sample in LAYOUTS["bagel_reca"]]) is plan is plan.to("cpu")


def test_plan_refuses():
    for sample, words in (
        ([Span(2, "casual")], "sample 1, span 0: mode must be one of causal, full, noise, pad, got 'casual'"),
        ([Span(2), Span(-1)], "sample 1, span 1: length must be 0 or more, got -1"),
        ([Span(2, "noise", visible_to_earlier=True)], "no other span attends to a noise span"),
        (Span(9), "sample 1, span 0: must be an AttentionSpan, got 9; a plan takes a list of spans per sample"),
        ([Span(2), Span(1, cached=True)], "span 1: cached spans are a prefix and must come first"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_plan([[Span(1)], sample])


# ---- arguments and the choice ----


def test_arguments_that_do_not_fit():
    plan, (q, k, v), _ = problem(LAYOUTS["bagel_target"], False)
    padded_plan, (pq, pk, pv), _ = problem(LAYOUTS["show_o_t2i"], True)
    short = k[: sum(plan.query_sizes)]
    for bad, error, words in (
        (lambda: attention(q[0], k, v, plan), ValueError, r"expected q \[Tq, Hq, d\]"),
        (lambda: attention(q, k, v[:-1], plan), ValueError, "expected q"),
        (lambda: attention(q, k[..., :4], v[..., :4], plan), ValueError, "expected q"),
        (lambda: attention(q[:-1], k, v, plan), ValueError, "the plan has 18 query rows, but the tensors have 17"),
        (lambda: attention(q, k[:-1], v[:-1], plan), ValueError, "the plan has 33 key rows, but the tensors have 32"),
        (lambda: attention(q[:, :3], k, v, plan), ValueError, "must be a multiple of key heads, got 3 and 2"),
        (lambda: attention(q.float(), k, v, plan), TypeError, "same dtype, got torch.float32, torch.float64"),
        (lambda: attention(q.long(), k, v, plan), TypeError, "q must be fp32, bf16 or fp16"),
        (lambda: attention(pq[:, 1:], pk, pv, padded_plan), ValueError, "2 samples of 16 query rows, but .* 2 of 15"),
        (lambda: attention(q, k, v, plan, prefix=(short, short)), ValueError, "15 cached and 18 other rows"),
        (lambda: attention(q, short, short, plan, prefix=(short.float(), short)), ValueError, "the prefix of k is"),
        (lambda: attention(q, k, v, plan, impl="fastest"), ValueError, "unknown impl 'fastest'; expected auto, fa4"),
    ):
        with pytest.raises(error, match=words):
            bad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_key_heads_are_repeated_where_no_fused_kernel_groups_them(monkeypatch, dtype):
    """On GPUs flash takes neither fp32 nor a mask, and torch's memory-efficient kernel no groups of heads."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    asked, inner = [], F.scaled_dot_product_attention

    def sdpa(q, k, v, **options):
        asked.append((k.shape[1], options["enable_gqa"], options["attn_mask"] is not None))
        return inner(q, k, v, **options)

    plan = attention_plan([[Span(4, cached=True), Span(6)], [Span(5, cached=True), Span(3, "full"), Span(2)]])
    q, k, v = (torch.randn(n, heads, 8).to(dtype) for n, heads in ((11, 4), (20, 2), (20, 2)))
    grouped = (2, True, False) if dtype == torch.bfloat16 else (4, False, False)
    masked = (4, False, True)
    for impl, calls in (("sdpa", [masked, masked, grouped]), ("dense", [masked])):
        wanted = IMPLS[impl](q, k, v, plan, 0.5, False)
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", sdpa)
            got = IMPLS[impl](*(x.as_subclass(OnGPU) for x in (q, k, v)), plan, 0.5, False)
        torch.testing.assert_close(got.as_subclass(torch.Tensor), wanted)
        assert sorted(asked) == sorted(calls)


def test_plan_on_another_device():
    plan, qkv, _ = problem(LAYOUTS["bagel_target"], False)
    with pytest.raises(ValueError, match=r"the plan is for meta, but q is on cpu; use plan.to"):
        attention(*qkv, plan.to("meta"))


def test_a_plan_is_of_one_gpu(monkeypatch):
    """Without an index it is the current one. Plans are kept, so each GPU has its own."""
    monkeypatch.setattr(plans, "_make_calls", lambda plan: None)
    made = []
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        made.append(attention_plan([(Span(5), Span(2, "full"))], device="cuda"))
    assert [plan.device for plan in made] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert made[1] is attention_plan(made[0].samples, device="cuda:1") is made[0].to("cuda")
    x = types.SimpleNamespace(ndim=3, shape=(7, 2, 8), dtype=torch.float32, device=torch.device("cuda", 1))
    op._check(x, x, x, made[1])
    with pytest.raises(ValueError, match="the plan is for cuda:0, but q is on cuda:1; use plan.to"):
        op._check(x, x, x, made[0])
    assert attention_plan(made[0].samples, device="cpu:0") is attention_plan(made[0].samples)


def test_forced_impl_never_falls_back(monkeypatch):
    plan, qkv, _ = problem(LAYOUTS["bagel_target"], False)
    with pytest.raises(
        RuntimeError, match=r"impl 'varlen' was asked for, but the tensors are on cpu.*never falls back"
    ):
        attention(*qkv, plan, impl="varlen")
    monkeypatch.setenv("RECA_ATTENTION", "varlen")
    with pytest.raises(RuntimeError, match="impl 'varlen' was asked for"):
        attention(*qkv, plan)
    same([attention(*qkv, plan, impl="sdpa")], [reference.attention(*qkv, plan)])


def test_choice_on_a_gpu(monkeypatch):
    """What a GPU would get, from what torch says of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Fake")
    device, half = torch.device("cuda", 0), torch.bfloat16
    assert choose(device, half, 80, False) == "fa2"  # the others have no kernels for compute capability 8.0
    assert choose(device, torch.float32, 80, False) == "sdpa"
    for module in flash_functions.MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    forget()
    assert choose(device, half, 80, False) == "varlen"
    assert choose(device, half, 84, False) == "sdpa"
    reason = implementations.unusable("varlen", device, half, 80, True)
    assert "deterministic only under torch.use_deterministic_algorithms(True) without warn_only" in reason
    assert choose(device, half, 80, True, torch_deterministic=True) == "varlen"
    assert choose(device, half, 80, False, "cudnn") == "cudnn"
    with pytest.raises(RuntimeError, match="'cudnn' was asked for, but torch has no deterministic gradient with cuDNN"):
        choose(device, half, 80, True, "cudnn", torch_deterministic=True)
    with pytest.raises(RuntimeError, match="deterministic=True, but no impl here .*; varlen: .*; sdpa: its gradient"):
        choose(device, half, 80, True)


@pytest.mark.parametrize("warn_only", [False, True])
def test_a_torch_that_only_warns_guarantees_nothing(monkeypatch, warn_only):
    """Its kernels keep their gradients then: nothing is asked by default, and what is asked is not torch's."""
    plan, qkv, _ = problem(LAYOUTS["bagel_target"], False)
    asked = []
    monkeypatch.setattr(op, "choose", lambda *arguments: asked.append(arguments[3::2]) or "sdpa")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        for deterministic in (None, True, False):
            attention(*qkv, plan, deterministic=deterministic)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [(not warn_only, not warn_only), (True, not warn_only), (False, not warn_only)]


@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2)])
def test_varlen_of_torch_2_11(monkeypatch, heads, kv_heads):
    """It has no enable_gqa and groups heads by itself; what it does not know it is not given."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    forget()
    plan, qkv, upstream = problem(LAYOUTS["bagel_reca"], False, heads, kv_heads)
    want = with_gradients(reference.attention(*qkv, plan), qkv, upstream)
    same(with_gradients(run("varlen", plan, qkv), qkv, upstream), want)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Fake")
    for module in flash_functions.MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    forget()
    assert choose(torch.device("cuda", 0), torch.bfloat16, 64, False) == "varlen"


def test_varlen_without_a_window_or_a_scale_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    asked = (torch.device("cuda", 0), torch.bfloat16, 64)
    for signature, told in (
        (lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None, "no scale and no window"),
        (lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None: None, "no window"),
    ):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", signature)
        forget()
        assert told in implementations.unusable("varlen", *asked)


def test_cpu_takes_the_mask_where_calls_cost_more():
    tiny = attention_plan([(Span(i % 5, "pad"), Span(10 - i % 5), Span(20, "full")) for i in range(64)])
    real = attention_plan(
        [
            (
                Span(2),
                Span(576, "full", True),
                Span(60 + i),
                Span(1024, "full"),
                Span(1),
            )
            for i in (0, 8)
        ]
    )
    assert dense_is_faster(tiny, heads=4, head_dim=16)
    assert not dense_is_faster(real, heads=32, head_dim=64)


def test_report_says_what_attention_runs_on():
    line = next(line for line in backend_report().splitlines() if line.startswith("attention on cpu: "))
    assert line.startswith("attention on cpu: sdpa, dense for small batches  (not fa4: the tensors are on cpu")


def test_flash_gets_the_determinism_flag(varlen_functions):
    if torch.cuda.is_available():
        pytest.skip("flash-attn itself may be here")
    plan, qkv, _ = problem(LAYOUTS["bagel_reca"], False)
    IMPLS["fa2"](*qkv, plan, 1.0, True)
    assert sorted(varlen_functions) == [("flash", False, True), ("flash", False, True), ("flash", True, True)]


def test_flash_3_with_its_log_sum_exp(monkeypatch):
    """FlashAttention 3 returned a tuple for some months."""
    if torch.cuda.is_available():
        pytest.skip("flash-attn itself may be here")
    plan, qkv, upstream = problem(LAYOUTS["bagel_reca"], False)
    want = with_gradients(reference.attention(*qkv, plan), qkv, upstream)
    plain = sys.modules["flash_attn_interface"].flash_attn_varlen_func
    monkeypatch.setattr(
        sys.modules["flash_attn_interface"], "flash_attn_varlen_func", lambda *a, **b: (plain(*a, **b), None)
    )
    same(with_gradients(run("fa3", plan, qkv), qkv, upstream), want)


def test_what_has_run_is_kept(monkeypatch):
    monkeypatch.setattr(op, "_RAN", set())
    plan, qkv, _ = problem(LAYOUTS["bagel_reca"], False, dtype=torch.float32)
    attention(*qkv, plan, impl="sdpa")
    attention(*qkv, plan, impl="sdpa")
    attention(*qkv, plan, impl="dense")
    assert op.ran("cpu") == ["dense (float32, head dimension 8)", "sdpa (float32, head dimension 8)"]
    assert op.ran("cuda") == []


def test_the_trial_tells_right_from_wrong(monkeypatch):
    assert op.trial(torch.device("cpu")).startswith("sdpa ran forward and backward and agrees with dense")
    right = IMPLS["sdpa"]
    monkeypatch.setitem(IMPLS, "sdpa", lambda q, k, *more: right(q, -k, *more))
    assert "DIFFERS from dense" in op.trial(torch.device("cpu"))

    def fails(*_):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setitem(IMPLS, "sdpa", fails)
    assert op.trial(torch.device("cpu")) == "sdpa FAILS: RuntimeError: no kernel image is available"
    monkeypatch.setenv("RECA_ATTENTION", "dense")
    assert op.trial(torch.device("cpu")).startswith("dense ran forward and backward and agrees with dense")
    monkeypatch.setenv("RECA_ATTENTION", "fa3")
    assert "impl 'fa3' was asked for, but the tensors are on cpu" in op.trial(torch.device("cpu"))


@pytest.mark.parametrize(
    "measured,dtype,chosen",
    [
        ({}, torch.bfloat16, "fa4"),  # the default order
        ({"NVIDIA Fake": ["varlen", "fa3", "sdpa"]}, torch.bfloat16, "varlen"),
        ({"NVIDIA Fake": ["dense", "flex", "cudnn", "fa3", "varlen"]}, torch.bfloat16, "fa3"),  # those are asked for
        ({"NVIDIA Fake": ["fa2", "sdpa"]}, torch.float32, "sdpa"),  # the fastest cannot run
        ({"NVIDIA Other": ["sdpa"]}, torch.bfloat16, "fa4"),
    ],
)
def test_the_order_is_what_was_measured_on_the_device(monkeypatch, measured, dtype, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Fake")
    table = {name: {"device": name, "order": order, "date": "2026-01-02"} for name, order in measured.items()}
    monkeypatch.setattr(orders, "measured", lambda: table)
    forget()
    device = torch.device("cuda", 0)
    assert choose(device, dtype, 64, False) == chosen
    known = "NVIDIA Fake" in measured
    assert orders.basis(device).startswith("order measured on NVIDIA Fake on 2026" if known else "default order")
    assert orders.order(torch.device("cpu")) == ("sdpa",)


# ---- system behaviour ----


def test_autocast_casts_as_torchs_attention_does():
    plan, (q, k, v), _ = problem(LAYOUTS["show_o_t2i"], True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v.bfloat16(), plan)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), plan))


@pytest.mark.parametrize("impl", ["sdpa", "dense", "fa2", "varlen"])
def test_compiles_into_one_graph(impl):
    def step(q, k, v, plan):
        return IMPLS[impl](q * 2, k, v, plan, 0.5, False)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=impl == "sdpa")
    for name in ("show_o_t2i", "show_o_reca_clip"):
        plan, qkv, upstream = problem(LAYOUTS[name], True)
        same(with_gradients(compiled(*qkv, plan), qkv, upstream), with_gradients(step(*qkv, plan), qkv, upstream), 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["show_o_t2i", "bagel_reca"])
def test_what_is_chosen_compiles_into_one_graph(name):
    """On a CPU the mask of a small batch would break the graph, and torch warned of caches that it ignores."""
    torch._dynamo.reset()
    plan, qkv, upstream = problem(LAYOUTS[name], False)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)(*qkv, plan)
    same(with_gradients(compiled, qkv, upstream), with_gradients(attention(*qkv, plan), qkv, upstream))


def test_checkpointing_recomputes_the_same():
    plan, qkv, upstream = problem(LAYOUTS["show_o_reca_vq"], True)
    again = checkpoint(attention, *qkv, plan, use_reentrant=False)
    same(with_gradients(again, qkv, upstream), with_gradients(attention(*qkv, plan), qkv, upstream), 0)


def test_cudnn_is_spared_a_single_key(monkeypatch):
    """torch: "cudnn SDPA does not support key/value sequence length 1"."""
    inner, seen = F.scaled_dot_product_attention, {}

    def watched(q, k, v, **options):
        seen[k.shape[2] == 1] = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        with sdpa_kernel(SDPBackend.MATH):
            return inner(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    plan, qkv, _ = problem(LAYOUTS["show_o_reca_vq"], False)
    got = implementations.cudnn(*qkv, plan, 0.5, False)
    assert seen == {True: (False, True), False: (True, False)}
    torch.testing.assert_close(got, implementations.sdpa(*qkv, plan, 0.5, False))


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("impl", list(IMPLS))
@pytest.mark.parametrize("heads,kv_heads,d", [(4, 4, 64), (4, 2, 80), (4, 1, 128)])
def test_impls_on_a_gpu(impl, name, heads, kv_heads, d):
    """Real kernels, forward and backward, in bf16; causal groups whose keys outnumber their rows are among them."""
    device = torch.device("cuda", 0)
    if reason := implementations.unusable(impl, device, torch.bfloat16, d):
        pytest.skip(reason)
    plan, qkv, upstream = problem(LAYOUTS[name], False, heads, kv_heads, d, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    exact = with_gradients(reference.attention(*wide, plan), wide, upstream.double())
    torchs = with_gradients(run("dense", plan, qkv), qkv, upstream)
    moved = [x.detach().to(device).requires_grad_() for x in qkv]
    out = attention(*moved, plan.to(device), impl=impl)
    for got, peer, want in zip(with_gradients(out, moved, upstream.to(device)), torchs, exact, strict=True):
        bound = 2 * (peer.double() - want).norm() + 1e-3 * want.norm() + 1e-6
        assert (got.cpu().double() - want).norm() <= bound


@pytest.mark.gpu
def test_gpu_deterministic_gradient():
    device = torch.device("cuda", 0)
    plan, qkv, upstream = problem([(Span(700), Span(900, "full"))] * 3, False, 8, 8, 64, torch.bfloat16)
    moved, upstream = [x.detach().to(device).requires_grad_() for x in qkv], upstream.to(device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (with_gradients(attention(*moved, plan.to(device)), moved, upstream) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("impl", ["sdpa", "dense"])
def test_second_derivatives_of_torchs_math_kernel(impl):
    """As the docstring says: by default torch's kernel has none on a CPU."""
    plan = attention_plan([[Span(3), Span(2, "full")], [Span(4), Span(1, "pad")]])
    q, k, v = (torch.randn(10, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *x: attention(*x, plan, impl=impl), (q, k, v))
