"""Benchmark of philox: counter-based normal numbers, compared with torch's stateful generator."""

from types import SimpleNamespace

import torch

from benchmarks.devices import Device
from benchmarks.rows import FORWARD
from benchmarks.runner import Case, Provider, compiled, ours, shapes
from reca_kernels import Philox, philox_normal

SHAPES = {
    "cpu": {"million": dict(samples=32, n=32768)},
    "cuda": {"bagel": dict(samples=7, n=16 * 128 * 128), "synthetic": dict(samples=256, n=1 << 20)},
    "sizes": {"16": dict(samples=1, n=16), "16k": dict(samples=16, n=1024)},
}


def cases(device: Device):
    place = device.torch_device
    for name, s in shapes(SHAPES, device):

        def inputs(seed, s=s):
            ids = torch.arange(s["samples"], device=place)
            return SimpleNamespace(noise=Philox(torch.tensor(seed, device=place), ids, 4), shape=(s["samples"], s["n"]))

        def drawn(shape):
            return torch.randn(shape, device=place)

        fast = compiled(drawn)

        def with_compile(x, fast=fast):
            return (fast(x.shape),)

        count = s["samples"] * s["n"]
        yield Case(
            op="philox",
            shape=name,
            dtype="float32",
            numel=count,
            inputs=inputs,
            leaves=(),
            providers={
                **ours("philox", device, lambda x, b: (philox_normal(x.noise, x.shape[1], backend=b),)),
                "torch.randn": Provider(lambda x, f=drawn: (f(x.shape),), exact=False),
                "torch.compile": Provider(with_compile, exact=False),
            },
            best="torch.randn",
            # The reference is fp32, and every backend is bit-identical to it.
            formula=lambda x: (philox_normal(x.noise, x.shape[1], backend="reference"),),
            bytes={FORWARD: 4 * count},
        )
