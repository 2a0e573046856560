"""Benchmark of masked_cross_entropy on logits of which some rows carry a label."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.devices import Device
from benchmarks.rivals import rival
from benchmarks.rows import BOTH
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, ours, shapes
from reca_kernels import masked_cross_entropy

# Show-o masks 2/pi of its codes on average; at 512 px 1024 of a sequence's 1155 positions are codes.
# Harmon's understanding loss covers the answers. A RECA micro-batch of Show-o has two images (four at 256 px).
SHAPES = {
    "cpu": {
        "show_o_512": dict(rows=1024, vocabulary=58498, labelled=0.637, dtypes=(FP32, BF16)),
        "harmon_i2t": dict(rows=256, vocabulary=151936, labelled=0.4, dtypes=(FP32, BF16)),
    },
    "cuda": {
        "show_o_512": dict(rows=20 * 1155, vocabulary=58498, labelled=0.637 * 1024 / 1155, dtypes=(BF16, FP32)),
        "show_o_512_reca": dict(rows=2 * 1024, vocabulary=58498, labelled=0.637, dtypes=(BF16,)),
        "harmon_i2t": dict(rows=8192, vocabulary=151936, labelled=0.4, dtypes=(BF16,)),
    },
    "sizes": {
        "8x64": dict(rows=8, vocabulary=64, labelled=0.6, dtypes=(FP32, BF16)),
        "64x1024": dict(rows=64, vocabulary=1024, labelled=0.6, dtypes=(FP32, BF16)),
        "512x8192": dict(rows=512, vocabulary=8192, labelled=0.6, dtypes=(FP32, BF16)),
    },
}

LIGER = "liger_kernel.transformers.functional"


def labels_for(rows: int, vocabulary: int, labelled: float, generator: torch.Generator) -> torch.Tensor:
    """Return labels [rows], -100 except in round(labelled * rows) random rows: as many for every seed."""
    labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=generator.device)
    order = torch.randperm(rows, generator=generator, device=generator.device)
    labels[order[round(labelled * rows) :]] = -100
    return labels


def cases(device: Device):
    place = device.torch_device
    for name, s in shapes(SHAPES, device):
        for dtype in s["dtypes"]:

            def inputs(seed, s=s, dtype=dtype):
                generator = torch.Generator(place).manual_seed(seed)
                labels = labels_for(s["rows"], s["vocabulary"], s["labelled"], generator)
                logits = torch.randn(s["rows"], s["vocabulary"], generator=generator, device=place).to(dtype)
                return SimpleNamespace(logits=logits.requires_grad_(), labels=labels, keep=labels != -100)

            def run(x, backend):
                return (masked_cross_entropy(x.logits, x.labels, backend=backend),)

            def upstream(x):  # fp32 copies of all rows, as in Show-o's trainer
                return (F.cross_entropy(x.logits.float(), x.labels, ignore_index=-100),)

            def gathered(x):
                return (F.cross_entropy(x.logits[x.keep].float(), x.labels[x.keep]),)

            def exact(x):
                return (F.cross_entropy(x.logits[x.keep], x.labels[x.keep]),)

            def step(logits, labels):
                return F.cross_entropy(logits.float(), labels, ignore_index=-100)

            fast = compiled(step)

            def with_compile(x, fast=fast):
                return (fast(x.logits, x.labels),)

            count = round(s["labelled"] * s["rows"])
            yield Case(
                op="masked_cross_entropy",
                shape=name,
                dtype=str(dtype).removeprefix("torch."),
                numel=s["rows"] * s["vocabulary"],
                inputs=inputs,
                leaves=("logits",),
                providers={
                    **ours("masked_cross_entropy", device, run),
                    "eager as upstream": Provider(upstream),
                    "eager, rows gathered": Provider(gathered),
                    "torch.compile": Provider(with_compile),
                    "Liger": rival("liger-kernel", LIGER, device, _liger, own_inputs=True),
                    "quack": rival("quack-kernels", "quack.cross_entropy", device, _quack),
                    "apex": rival("apex", "apex.contrib.xentropy", device, _apex),
                    "flash-attn": rival("flash-attn", "flash_attn.ops.triton.cross_entropy", device, _flash),
                },
                best="eager, rows gathered",
                formula=exact,
                # labelled rows read, all rows of the gradient written
                bytes={BOTH: (count + s["rows"]) * s["vocabulary"] * dtype.itemsize},
            )


def _liger(module):
    return lambda x: (module.liger_cross_entropy(x.logits, x.labels, ignore_index=-100),)


def _quack(module):
    return lambda x: (module.cross_entropy(x.logits, x.labels, ignore_index=-100, reduction="mean"),)


def _apex(module):
    """Call apex. It reads the logit of every label, so ignored rows get class 0, and their loss is masked out."""

    def run(x):
        losses = module.SoftmaxCrossEntropyLoss.apply(x.logits, x.labels.clamp(min=0), 0.0, -1, True)
        return ((losses * x.keep).sum() / x.keep.sum(),)

    return run


def _flash(module):
    return lambda x: (module.cross_entropy_loss(x.logits, x.labels, ignore_index=-100)[0].sum() / x.keep.sum(),)
