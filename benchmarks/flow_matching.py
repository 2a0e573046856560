"""Benchmark of flow_matching: noisy input, loss and gradient, including noise generation."""

from types import SimpleNamespace

import torch

from benchmarks.devices import Device
from benchmarks.rows import BOTH
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, ours, shapes
from reca_kernels import Philox, flow_matching_add_noise, flow_matching_loss
from reca_kernels.flow_matching.reference import tokens

SHAPES = {
    "cpu": {
        "open_uni": dict(sizes=[(32, 32, 32)] * 32, patch=1, dtypes=(FP32,)),
        "bagel": dict(sizes=[(16, 128, 128)] * 4 + [(16, 64, 96)] * 3, patch=2, dtypes=(FP32,)),
    },
    "cuda": {
        "open_uni": dict(sizes=[(32, 32, 32)] * 32, patch=1, dtypes=(FP32, BF16)),
        "bagel": dict(sizes=[(16, 128, 128)] * 7, patch=2, dtypes=(FP32, BF16)),
        "synthetic": dict(sizes=[(16, 256, 256)] * 256, patch=1, dtypes=(FP32, BF16)),
    },
    "sizes": {
        "1 image of 4x4": dict(sizes=[(4, 4, 4)], patch=1, dtypes=(FP32, BF16)),
        "8 images of 16x16": dict(sizes=[(4, 16, 16)] * 8, patch=1, dtypes=(FP32, BF16)),
    },
}


def cases(device: Device):
    place = device.torch_device
    for name, s in shapes(SHAPES, device):
        patch, counts = s["patch"], torch.tensor([c * h * w for c, h, w in s["sizes"]], device=place)
        total = int(counts.sum())
        for dtype in s["dtypes"]:

            def inputs(seed, s=s, dtype=dtype, patch=patch):
                generator = torch.Generator(place).manual_seed(seed)
                images = [torch.randn(size, generator=generator, device=place).to(dtype) for size in s["sizes"]]
                t = torch.rand(len(images), generator=generator, device=place)
                x = SimpleNamespace(images=images, t=t)
                x.x0 = torch.stack(images) if patch == 1 else images
                x.noise = Philox(torch.tensor(seed, device=place), torch.arange(len(images), device=place), 4)
                shape = flow_matching_add_noise(x.x0, t, x.noise, patch=patch, backend="reference").shape
                x.pred = torch.randn(shape, generator=generator, device=place).to(dtype).requires_grad_()
                return x

            def run(x, backend, patch=patch):
                x_t = flow_matching_add_noise(x.x0, x.t, x.noise, patch=patch, backend=backend)
                return x_t, flow_matching_loss(x.pred, x.x0, x.t, x.noise, patch=patch, backend=backend)

            def upstream(x, patch=patch):  # image by image
                clean = torch.cat([tokens(image, patch) for image in x.images])
                levels = torch.cat([level.expand(image.numel()) for level, image in zip(x.t, x.images, strict=True)])
                eps = torch.randn_like(clean)
                x_t = (1 - levels) * clean + levels * eps
                return x_t, ((x.pred.flatten() - (eps - clean)) ** 2).mean()

            def eager(x, patch=patch, counts=counts, total=total):
                whole = patch == 1
                clean = x.x0.flatten(1) if whole else torch.cat([tokens(image, patch) for image in x.images])
                level = x.t[:, None] if whole else x.t.repeat_interleave(counts, output_size=total)
                eps = torch.randn_like(clean)
                x_t = torch.lerp(clean, eps, level.to(clean.dtype))
                return x_t, (x.pred.view_as(clean) - eps).add(clean).square().mean()

            def step(clean, level, pred):
                eps = torch.randn_like(clean)
                return (1 - level) * clean + level * eps, (pred - (eps - clean)).square().mean()

            fast = compiled(step)

            def with_compile(x, patch=patch, counts=counts, total=total, fast=fast):
                clean = torch.cat([tokens(image, patch) for image in x.images])
                return fast(clean, x.t.repeat_interleave(counts, output_size=total), x.pred.flatten())

            yield Case(
                op="flow_matching",
                shape=name,
                dtype=str(dtype).removeprefix("torch."),
                numel=total,
                inputs=inputs,
                leaves=("pred",),
                providers={
                    **ours("flow_matching", device, run),
                    "eager as upstream": Provider(upstream, exact=False),
                    "eager": Provider(eager, exact=False),
                    "torch.compile": Provider(with_compile, exact=False),
                },
                best="eager",
                formula=lambda x, run=run: run(x, "reference"),
                # x0 twice, x_t, pred and its gradient
                bytes={BOTH: 5 * dtype.itemsize * total},
            )
