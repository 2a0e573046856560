"""Benchmark of row_gradients, the kernel of masked_linear_cross_entropy between its matmuls.

It computes losses and overwrites the logits with their gradients.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.devices import Device
from benchmarks.rows import FORWARD, OURS
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, shapes
from reca_kernels import dispatch
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_linear_cross_entropy.kernels import Kernels
from reca_kernels.masked_linear_cross_entropy.plan import PITCH

# One chunk of each shape of masked_linear_cross_entropy, as planned by plan.py.
SHAPES = {
    "cpu": {
        "show_o_512": dict(rows=512, vocabulary=58498, dtypes=(FP32, BF16)),
        "harmon_i2t": dict(rows=256, vocabulary=151936, dtypes=(FP32,)),
    },
    "cuda": {
        "show_o_512": dict(rows=13038, vocabulary=58498, dtypes=(BF16, FP32)),
        "show_o_512_reca": dict(rows=1305, vocabulary=58498, dtypes=(BF16,)),
        "harmon_i2t": dict(rows=3277, vocabulary=151936, dtypes=(BF16,)),
    },
    "sizes": {"4x64": dict(rows=4, vocabulary=64, dtypes=(FP32, BF16))},
}

LINEAR = "masked_linear_cross_entropy"
OPTIONS = CrossEntropyOptions(-100, 0.0, 0.0, None, "sum")


def cases(device: Device):
    place = device.torch_device
    for name, s in shapes(SHAPES, device):
        for dtype in s["dtypes"]:
            rows, classes = s["rows"], s["vocabulary"]

            def inputs(seed, rows=rows, classes=classes, dtype=dtype):
                generator = torch.Generator(place).manual_seed(seed)
                pitch = -(-classes // PITCH) * PITCH
                logits = torch.randn(rows, pitch, generator=generator, device=place).to(dtype)[:, :classes]
                labels = torch.randint(0, classes, (rows,), generator=generator, device=place)
                numbers = torch.arange(rows, device=place)
                one = torch.ones((), device=place)
                return SimpleNamespace(logits=logits, labels=labels, numbers=numbers, one=one)

            def run(x, backend):  # in place
                kernels: Kernels = dispatch.load(backend, LINEAR)
                losses = torch.empty(len(x.labels), device=x.labels.device)
                kernels.row_gradients(x.logits, None, x.labels, x.numbers, None, x.one, OPTIONS, losses, True)
                return losses, x.logits

            def eager(x):
                z = x.logits if x.logits.dtype == torch.float64 else x.logits.float()
                log_p = F.log_softmax(z, -1)
                own = x.labels[:, None]
                gradient = log_p.exp().scatter_add(1, own, -torch.ones_like(log_p[:, :1]))
                return -log_p.gather(1, own)[:, 0], gradient.to(x.logits.dtype)

            fast = compiled(eager)
            reasons = {b: dispatch.unusable(LINEAR, b, place.type) for b in device.backends}
            yield Case(
                op="row_gradients",
                shape=name,
                dtype=str(dtype).removeprefix("torch."),
                numel=rows * classes,
                inputs=inputs,
                leaves=(),
                providers={
                    **{f"{OURS}: {b}": why or Provider(lambda x, b=b: run(x, b), True) for b, why in reasons.items()},
                    "eager": Provider(eager),
                    "torch.compile": Provider(lambda x, fast=fast: fast(x)),
                },
                best="eager",
                formula=eager,
                bytes={FORWARD: 2 * rows * classes * dtype.itemsize},  # reads each logit, writes its gradient
            )
