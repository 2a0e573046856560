"""Benchmark of diffusion_loss: MAR's loss on Harmon's rows, including add_noise."""

import math
from types import SimpleNamespace

import torch

from benchmarks.devices import Device
from benchmarks.rows import BOTH
from benchmarks.runner import BF16, FP32, Case, Provider, compiled, ours, shapes
from reca_kernels import Philox, diffusion_add_noise, diffusion_loss, diffusion_schedule
from reca_kernels.diffusion_loss import reference

# harmon_hidden_rows: the loss over the masked rows only, a quarter of all rows here
SHAPES = {
    "cpu": {
        "harmon_512": dict(samples=32 * 1024, channels=16, repeats=4, dtypes=(FP32,)),
        "harmon_hidden_rows": dict(samples=8 * 1024, channels=16, repeats=4, dtypes=(FP32,)),
    },
    "cuda": {
        "harmon_512": dict(samples=32 * 1024, channels=16, repeats=4, dtypes=(FP32, BF16)),
        "harmon_512_reca": dict(samples=48 * 1024, channels=16, repeats=4, dtypes=(BF16,)),
    },
    "sizes": {
        "8 rows": dict(samples=4, channels=16, repeats=2, dtypes=(FP32, BF16)),
        "1024 rows": dict(samples=512, channels=16, repeats=2, dtypes=(FP32, BF16)),
    },
}


def cases(device: Device):
    place = device.torch_device
    for name, s in shapes(SHAPES, device):
        count, channels = s["samples"] * s["repeats"], s["channels"]
        for dtype in s["dtypes"]:

            def inputs(seed, s=s, count=count, channels=channels, dtype=dtype):
                generator = torch.Generator(place).manual_seed(seed)
                out = torch.randn(count, 2 * channels, generator=generator, device=place).to(dtype)
                return SimpleNamespace(
                    x0=torch.randn(s["samples"], channels, generator=generator, device=place) * 0.5,
                    rows=torch.arange(count, device=place) % s["samples"],
                    t=torch.randint(0, 1000, (count,), generator=generator, device=place),
                    out=out.requires_grad_(),
                    table=diffusion_schedule(device=place),
                    noise=Philox(torch.tensor(seed, device=place), torch.arange(count, device=place), 4),
                )

            def run(x, backend):
                x_t = diffusion_add_noise(x.x0, x.t, x.noise, x.table, rows=x.rows, backend=backend)
                return x_t, diffusion_loss(x.out, x.x0, x.t, x.noise, x.table, rows=x.rows, backend=backend)

            def exact(x):
                return run(SimpleNamespace(**{**vars(x), "table": reference.schedule(1000).to(place)}), "reference")

            def upstream(x):
                return _as_upstream(x.x0.repeat(len(x.t) // len(x.x0), 1), x.t, x.out.float(), x.table)

            def step(x0, t, rows, out, table):
                eps = torch.randn(len(t), x0.shape[1], device=place)
                x_t = reference.add_noise(x0, t, eps, table, rows)
                return x_t, reference.losses(out.float(), x0, t, eps, table, rows).mean()

            def eager(x, step=step):
                return step(x.x0, x.t, x.rows, x.out, x.table)

            fast = compiled(step)

            def with_compile(x, fast=fast):
                return fast(x.x0, x.t, x.rows, x.out, x.table)

            yield Case(
                op="diffusion_loss",
                shape=name,
                dtype=str(dtype).removeprefix("torch."),
                numel=count * 2 * channels,
                inputs=inputs,
                leaves=("out",),
                providers={
                    **ours("diffusion_loss", device, run),
                    "eager as upstream": Provider(upstream, exact=False),
                    "eager, one gather": Provider(eager, exact=False),
                    "torch.compile": Provider(with_compile, exact=False),
                },
                best="eager, one gather",
                formula=exact,
                # out and its gradient in their dtype; x0 once per distinct row and pass, x_t; t and rows
                bytes={
                    BOTH: 2 * 2 * channels * count * dtype.itemsize
                    + 4 * channels * (2 * s["samples"] + count)
                    + 16 * count
                },
            )


def _as_upstream(x0, t, out, table):
    """Compute the loss as the public code does: gathers each fp64 table, computes both posteriors and all branches."""
    columns = [table[:, i].double() for i in range(table.shape[1])]

    def at(i):
        return columns[i][t].float()[:, None] + torch.zeros_like(x0)

    eps = torch.randn_like(x0)
    x_t = at(0) * x0 + at(1) * eps
    predicted, v = out.chunk(2, dim=1)
    share = (v + 1) / 2
    log_variance = share * at(7) + (1 - share) * at(6)
    guess = at(2) * x_t - at(3) * predicted.detach()
    mean, truth = at(4) * guess + at(5) * x_t, at(4) * x0 + at(5) * x_t
    kl = 0.5 * (
        -1.0 + log_variance - at(6) + torch.exp(at(6) - log_variance) + (truth - mean) ** 2 * torch.exp(-log_variance)
    )
    kl = kl.mean(1) / math.log(2)
    likelihood = -reference._log_bin(x0, mean, log_variance).mean(1) / math.log(2)
    return x_t, (((eps - predicted) ** 2).mean(1) + torch.where(t == 0, likelihood, kl)).mean()
