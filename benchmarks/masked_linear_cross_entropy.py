"""Benchmark of masked_linear_cross_entropy: fused output head and cross-entropy, without materialised logits."""

import inspect
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.devices import Device
from benchmarks.masked_cross_entropy import LIGER, labels_for
from benchmarks.rivals import rival
from benchmarks.rows import ALONE, BOTH
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, ours, shapes
from reca_kernels import masked_linear_cross_entropy
from reca_kernels.masked_linear_cross_entropy.linear_chunks import multiply_logits
from reca_kernels.masked_linear_cross_entropy.plan import PITCH, machine, plan

# Phi's head (Show-o) has a bias, Qwen2's does not. The last two GPU shapes are those of published timings (Liger-Kernel
# pull request 1356, on an H200).
SHAPES = {
    "cpu": {
        "show_o_512": dict(rows=2048, hidden=1024, vocabulary=58498, labelled=0.637, bias=True, dtypes=(FP32,)),
        "show_o_narrow": dict(rows=1155, hidden=256, vocabulary=58498, labelled=0.637, bias=True, dtypes=(FP32,)),
    },
    "cuda": {
        "show_o_512": dict(
            rows=20 * 1155, hidden=2048, vocabulary=58498, labelled=0.637 * 1024 / 1155, bias=True, dtypes=(BF16,)
        ),
        "show_o_512_reca": dict(
            rows=2 * 1024, hidden=2048, vocabulary=58498, labelled=0.637, bias=True, dtypes=(BF16,)
        ),
        "harmon_i2t": dict(rows=8192, hidden=1536, vocabulary=151936, labelled=0.4, bias=False, dtypes=(BF16,)),
        "llm_2048": dict(rows=2048, hidden=2048, vocabulary=102400, labelled=1.0, bias=False, dtypes=(BF16,)),
        "llm_4096": dict(rows=4096, hidden=4096, vocabulary=128256, labelled=1.0, bias=False, dtypes=(BF16,)),
    },
    "sizes": {
        "8x32": dict(rows=8, hidden=32, vocabulary=64, labelled=0.6, bias=True, dtypes=(FP32, BF16)),
        "128x128": dict(rows=128, hidden=128, vocabulary=2048, labelled=0.6, bias=True, dtypes=(FP32, BF16)),
    },
}

WAITS = ", max_labelled not given"


def cases(device: Device):
    place, real = device.torch_device, SHAPES["cuda"].values()  # synchronisation matters on GPUs only
    for name, s in shapes(SHAPES, device):
        for dtype in s["dtypes"]:

            def inputs(seed, s=s, dtype=dtype):
                generator = torch.Generator(place).manual_seed(seed)

                def drawn(*shape):
                    return torch.randn(shape, generator=generator, device=place)

                labels = labels_for(s["rows"], s["vocabulary"], s["labelled"], generator)
                return SimpleNamespace(
                    hidden=drawn(s["rows"], s["hidden"]).to(dtype).requires_grad_(),
                    weight=(drawn(s["vocabulary"], s["hidden"]) * 0.02).to(dtype).requires_grad_(),
                    bias=(drawn(s["vocabulary"]) * 0.02).to(dtype).requires_grad_() if s["bias"] else None,
                    labels=labels,
                    keep=labels != -100,
                )

            count = round(s["labelled"] * s["rows"])

            def run(x, backend, count=count):
                options = {"backend": backend, "max_labelled": count}
                return (masked_linear_cross_entropy(x.hidden, x.weight, x.labels, x.bias, **options),)

            def counting(x, backend):  # the device counts the labels, which synchronises with the host
                return run(x, backend, None)

            def upstream(x):  # logits of all rows, in fp32
                return (F.cross_entropy(F.linear(x.hidden, x.weight, x.bias).float(), x.labels, ignore_index=-100),)

            def gathered(x):
                return (F.cross_entropy(F.linear(x.hidden[x.keep], x.weight, x.bias).float(), x.labels[x.keep]),)

            def exact(x):
                return (F.cross_entropy(F.linear(x.hidden[x.keep], x.weight, x.bias), x.labels[x.keep]),)

            def step(hidden, weight, bias, labels):
                return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=-100)

            fast = compiled(step)

            def with_compile(x, fast=fast):
                return (fast(x.hidden, x.weight, x.bias, x.labels),)

            products = count * s["vocabulary"] * s["hidden"]
            sizes = (2 * s["rows"] + 2 * s["vocabulary"]) * s["hidden"] + (2 * s["vocabulary"] if s["bias"] else 0)
            yield Case(
                op="masked_linear_cross_entropy",
                shape=name,
                dtype=str(dtype).removeprefix("torch."),
                numel=s["rows"] * s["hidden"],
                inputs=inputs,
                leaves=("hidden", "weight", "bias") if s["bias"] else ("hidden", "weight"),
                providers={
                    **ours("masked_linear_cross_entropy", device, run),
                    **(ours("masked_linear_cross_entropy", device, counting, WAITS) if s in real else {}),
                    ALONE: Provider(lambda x, count=count: _products(x, count), exact=False),
                    "eager as upstream": Provider(upstream),
                    "eager, rows gathered": Provider(gathered),
                    "torch.compile": Provider(with_compile),
                    "F.linear_cross_entropy": _torch(),
                    "Liger": rival("liger-kernel", LIGER, device, _liger),
                    "CCE": rival("cut-cross-entropy", "cut_cross_entropy", device, _cce("cce", s["bias"])),
                    "CCE, exact": rival("cut-cross-entropy", "cut_cross_entropy", device, _cce("cce_exact", s["bias"])),
                    "quack": "takes no bias (quack-kernels)"
                    if s["bias"]
                    else rival("quack-kernels", "quack.linear_cross_entropy", device, _quack),
                },
                best="eager, rows gathered",
                formula=exact,
                # hidden, weight and bias read once, their gradients written once; one matmul forward, two backward
                bytes={BOTH: sizes * dtype.itemsize},
                flops={BOTH: 6 * products},
            )


class _Products(torch.autograd.Function):
    """Only the three matmuls of the labelled rows, over whole tiles: no loss, no gathering.

    The logits are computed in the same blocks of columns as by the op.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, count):
        x, body = hidden[:count], len(weight) // PITCH * PITCH or len(weight)
        w = weight[:body]
        dx, dw = torch.empty_like(hidden), torch.empty_like(weight)
        logits = x.new_empty(count, body)
        multiply_logits(x, w, logits, plan(count, body, x.shape[1], x.dtype.itemsize, machine(x.device)))
        torch.mm(logits, w, out=dx[:count])
        torch.mm(logits.t(), x, out=dw[:body])
        ctx.gradients = dx, dw, None if bias is None else torch.empty_like(bias)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        return *ctx.gradients, None


def _products(x: SimpleNamespace, count: int) -> tuple[torch.Tensor, ...]:
    return (_Products.apply(x.hidden, x.weight, x.bias, count),)


def _torch() -> Provider | str:
    """Return torch's own op, which computes in chunks of rows when options are given."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"not in torch {torch.__version__}"
    options = torch.nn.LinearCrossEntropyOptions()

    def run(x):
        settings = {"linear_bias": x.bias, "ignore_index": -100, "options": options}
        return (F.linear_cross_entropy(x.hidden, x.weight, x.labels, **settings),)

    return Provider(run)


def _liger(module):
    return lambda x: (
        module.liger_fused_linear_cross_entropy(x.hidden, x.weight, x.labels, bias=x.bias, ignore_index=-100),
    )


def _cce(implementation: str, with_bias: bool):
    """Return a function that runs CCE. "cce" skips negligible gradients, "cce_exact" does not.

    Version 25.1.1 supports neither "cce_exact" nor a bias.
    """

    def make(module):
        if implementation not in (one.name.lower() for one in module.LinearCrossEntropyImpl):
            raise AttributeError(f"no impl {implementation!r}")
        if with_bias and "bias" not in inspect.signature(module.linear_cross_entropy).parameters:
            raise AttributeError("it does not support a bias")

        def run(x):
            bias = {} if x.bias is None else {"bias": x.bias}
            options = {"ignore_index": -100, "impl": implementation}
            return (module.linear_cross_entropy(x.hidden, x.weight, x.labels, **bias, **options),)

        return run

    return make


def _quack(module):
    return lambda x: (
        module.chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, ignore_index=-100, reduction="mean"),
    )
