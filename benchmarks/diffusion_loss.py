"""diffusion_loss: MAR's loss on Harmon's rows, noising included."""

import math

import torch

from benchmarks.runner import Case, compiled, gradients
from benchmarks.shapes import DIFFUSION
from reca_kernels import Philox, diffusion_loss, diffusion_prepare, diffusion_schedule
from reca_kernels.reference import diffusion_loss as reference

BEST_EAGER = "eager, one gather"


def cases():
    for name, s in DIFFUSION.items():
        generator = torch.Generator().manual_seed(0)
        count, channels = s["samples"] * s["repeats"], s["channels"]
        x0 = torch.randn(s["samples"], channels, generator=generator) * 0.5
        rows = torch.arange(count) % s["samples"]
        t = torch.randint(0, 1000, (count,), generator=generator)
        out = torch.randn(count, 2 * channels, generator=generator).requires_grad_()
        table = diffusion_schedule()
        noise = Philox(torch.tensor(5), torch.arange(count), 4)

        def ours(x0=x0, t=t, rows=rows, noise=noise, out=out, table=table):
            x_t = diffusion_prepare(x0, t, noise, table, rows=rows)
            return x_t, *gradients(diffusion_loss(out, x0, t, noise, table, rows=rows), out)

        def formula(x0, t, rows, out, table):
            eps = torch.randn(len(t), x0.shape[1])
            x_t = reference.prepare(x0, t, eps, table, rows)
            return x_t, reference.losses(out, x0, t, eps, table, rows).mean()

        def eager(x0=x0, t=t, rows=rows, out=out, table=table):
            x_t, loss = formula(x0, t, rows, out, table)
            return x_t, *gradients(loss, out)

        def upstream(x0=x0, t=t, rows=rows, out=out, table=table):
            x_t, loss = _as_upstream(x0.repeat(len(t) // len(x0), 1), t, out, table)
            return x_t, *gradients(loss, out)

        fast = compiled(formula)

        def with_compile(x0=x0, t=t, rows=rows, out=out, table=table, fast=fast):
            x_t, loss = fast(x0, t, rows, out, table)
            return x_t, *gradients(loss, out)

        def exact(x0=x0, t=t, rows=rows, noise=noise, out=out):
            wide, table, o = x0.double(), reference.schedule(1000), out.detach().double().requires_grad_()
            x_t = diffusion_prepare(wide, t, noise, table, rows=rows, backend="reference")
            return x_t, *gradients(diffusion_loss(o, wide, t, noise, table, rows=rows, backend="reference"), o)

        providers = {"ours": ours, "eager as upstream": upstream, BEST_EAGER: eager, "torch.compile": with_compile}
        yield Case("diffusion_loss", name, "float32", providers, {"ours": exact}, count * (4 * channels * 4 + 2 * 4))


def _as_upstream(x0, t, out, table):
    """The public formulation's shape: fp64 tables gathered one at a time, both posteriors, every branch computed."""
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
    kl = 0.5 * (-1.0 + log_variance - at(6) + torch.exp(at(6) - log_variance) + (truth - mean) ** 2 * torch.exp(-log_variance))
    kl = kl.mean(1) / math.log(2)
    likelihood = -reference._log_bin(x0, mean, log_variance).mean(1) / math.log(2)
    return x_t, (((eps - predicted) ** 2).mean(1) + torch.where(t == 0, likelihood, kl)).mean()
