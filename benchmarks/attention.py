"""Benchmark of attention over spans, compared with one call with a dense mask."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.devices import Device
from benchmarks.rows import BACKWARD, BOTH, FORWARD, OURS
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, shapes
from reca_kernels import AttentionSpan, attention, attention_plan
from reca_kernels.attention import reference
from reca_kernels.attention.implementations import IMPLS, unusable

# Spans of a sample: (length, mode, visible to earlier). Show-o: two tokens, h_v visible to all rows, prompt, codes, one
# token. BAGEL: SigLIP features with their markers, template, noised latents of 1024 px.
SHOW_O = [(2, "causal"), (576, "full", True), (127, "causal"), (1024, "full"), (1, "causal")]
BAGEL = [(258, "full"), (326, "causal"), (4098, "noise")]
SHAPES = {
    "cpu": {
        "show_o_512": dict(batch=1, spans=SHOW_O, heads=(4, 4), channels=64, dtypes=(FP32,)),
        "bagel": dict(batch=1, spans=[(n // 4, *r) for n, *r in BAGEL], heads=(4, 2), channels=128, dtypes=(FP32,)),
    },
    "cuda": {
        "show_o_512": dict(batch=20, spans=SHOW_O, heads=(32, 32), channels=64, dtypes=(BF16,)),
        "bagel": dict(batch=7, spans=BAGEL, heads=(28, 4), channels=128, dtypes=(BF16,)),
    },
    "sizes": {
        "24 rows": dict(
            batch=2, spans=[(8, "causal"), (8, "full", True), (8, "noise")], heads=(2, 1), channels=16, dtypes=(FP32,)
        ),
    },
}


def cases(device: Device):
    for name, s in shapes(SHAPES, device):
        for dtype in s["dtypes"]:
            yield _case(device, name, s, dtype)


def _case(device: Device, name: str, s: dict, dtype: torch.dtype) -> Case:
    place, (heads, kv_heads), channels, batch = device.torch_device, s["heads"], s["channels"], s["batch"]
    spans = [AttentionSpan(*span) for span in s["spans"]]
    length = sum(span.length for span in spans)
    plan, one = attention_plan([spans] * batch, device=place), attention_plan([spans], device=place)

    def inputs(seed):
        generator = torch.Generator(place).manual_seed(seed)

        def drawn(n):
            return torch.randn(batch, length, n, channels, generator=generator, device=place).to(dtype)

        q, k, v = (drawn(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
        # As in the released trainers, once per step: 0 where a row attends to a key, else the lowest number.
        mask = torch.zeros(batch, 1, length, length, dtype=dtype, device=place)
        mask.masked_fill_(~reference.allowed(spans).to(place), torch.finfo(dtype).min)
        return SimpleNamespace(q=q, k=k, v=v, mask=mask, grad=drawn(heads))

    def by(impl):
        reason = unusable(impl, place, dtype, channels, False)
        return reason or Provider(lambda x: (attention(x.q, x.k, x.v, plan, impl=impl),))

    def masked(q, k, v, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if heads != kv_heads:  # in memory, as BAGEL's trainer does: with a mask torch's fused kernels group no heads
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    fast = compiled(masked)

    def exact(x):
        """Compute sample by sample with activation checkpointing: the fp64 scores of all do not fit into memory."""
        samples = (
            checkpoint(reference.attention, *(y[b : b + 1] for y in (x.q, x.k, x.v)), one, use_reentrant=False)
            for b in range(batch)
        )
        return (torch.cat([*samples]),)

    rows = batch * length * channels * dtype.itemsize
    products = plan.pairs * heads * channels  # multiply-adds of one matmul, with two FLOPs each
    # forward: q, k, v and the output; backward: reads these and the output's gradient, writes three gradients
    forward, backward = rows * (2 * heads + 2 * kv_heads), rows * (4 * heads + 4 * kv_heads)
    return Case(
        op="attention",
        shape=name,
        dtype=str(dtype).removeprefix("torch."),
        numel=batch * length * heads * channels,
        inputs=inputs,
        leaves=("q", "k", "v"),
        providers={
            **{f"{OURS}: {impl}": by(impl) for impl in IMPLS},
            "eager as upstream": Provider(lambda x: (masked(x.q, x.k, x.v, x.mask),)),
            "torch.compile": Provider(lambda x: (fast(x.q, x.k, x.v, x.mask),)),
        },
        best="eager as upstream",
        formula=exact,
        bytes={FORWARD: forward, BACKWARD: backward, BOTH: forward + backward},
        # two matmuls forward, five backward
        flops={FORWARD: 4 * products, BACKWARD: 10 * products, BOTH: 14 * products},
    )
