"""MAR's diffusion loss in plain PyTorch: the reference implementation.

Nichol, Dhariwal: Improved denoising diffusion probabilistic models (2021), learned-range variance; Li et al.:
Autoregressive image generation without vector quantization (2024).
"""

import math

import torch
from torch import Tensor

from reca_kernels.philox.reference import Address, philox_normal

COLUMNS = ("sqrt_abar", "sqrt_1m_abar", "sqrt_recip", "sqrt_recip_m1", "c1", "c2", "log_posterior", "log_beta")


def betas(steps: int, kept: Tensor | None = None) -> Tensor:
    """Return the betas of the cosine schedule, at most 0.999, fp64 [steps]; for kept steps, those with their abar."""
    f = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * (math.pi / 2)).square()
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if kept is None:
        return beta
    abar = (1 - beta).cumprod(0)[kept]
    return 1 - abar / torch.cat((abar.new_ones(1), abar[:-1]))


def schedule(steps: int, kept: Tensor | None = None) -> Tensor:
    """Return the table of the cosine schedule, fp64 [steps or kept, 8], with the columns COLUMNS."""
    return tables(betas(steps, kept))


def tables(beta: Tensor) -> Tensor:
    """Return the table of arbitrary betas, fp64 [steps]."""
    abar = (1 - beta).cumprod(0)
    before = torch.cat((abar.new_ones(1), abar[:-1]))
    posterior = beta * (1 - before) / (1 - abar)
    log_posterior = torch.cat((posterior[1:2], posterior[1:])).log() if len(beta) > 1 else beta.log()
    c1, c2 = beta * before.sqrt() / (1 - abar), (1 - before) * (1 - beta).sqrt() / (1 - abar)
    signal = abar.sqrt(), (1 - abar).sqrt(), (1 / abar).sqrt(), (1 / abar - 1).sqrt()
    return torch.stack((*signal, c1, c2, log_posterior, beta.log()), dim=1)


def noise_of(x0: Tensor, noise: Tensor | Address) -> Tensor:
    """eps [M, C]."""
    return noise if isinstance(noise, Tensor) else philox_normal(*noise, x0.shape[1])


def add_noise(x0: Tensor, t: Tensor, noise: Tensor | Address, table: Tensor, rows: Tensor | None) -> Tensor:
    """Return x_t, [M, C]."""
    x0 = _wide(x0 if rows is None else x0[rows])
    step = table.to(x0)[t]
    return step[:, 0:1] * x0 + step[:, 1:2] * noise_of(x0, noise)


def losses(out: Tensor, x0: Tensor, t: Tensor, noise: Tensor | Address, table: Tensor, rows: Tensor | None) -> Tensor:
    """Return per row, [M], the MSE of the noise plus the variational bound in bits, with its mean detached."""
    out = _wide(out)
    x0 = (x0 if rows is None else x0[rows]).to(out.dtype)
    eps = noise_of(x0, noise).to(out.dtype)
    predicted, variance = out.chunk(2, dim=1)
    sqrt_abar, sqrt_1m, recip, recip_m1, c1, c2, log_posterior, log_beta = table.to(out)[t][:, :, None].unbind(1)
    x_t = sqrt_abar * x0 + sqrt_1m * eps
    log_variance = log_posterior + (variance + 1) / 2 * (log_beta - log_posterior)
    truth = c1 * x0 + c2 * x_t
    mean = c1 * (recip * x_t - recip_m1 * predicted.detach()) + c2 * x_t
    bound = 0.5 * (
        log_variance - log_posterior - 1
        + torch.exp(log_posterior - log_variance)
        + (truth - mean).square() * torch.exp(-log_variance)
    )  # fmt: skip
    # In fp64, because the probability of a bin is a small difference of two cumulative probabilities.
    first = -_log_bin(x0.double(), mean.double(), log_variance.double()).to(out.dtype)
    bound = torch.where((t == 0)[:, None], first, bound)
    return (predicted - eps).square().mean(1) + bound.mean(1) / math.log(2)


def _log_bin(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log probability of the bin of width 2/255 around x."""
    inverse = torch.exp(-0.5 * log_variance)
    above, below = (_cdf(inverse * (x - mean + side / 255)) for side in (1, -1))
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return p.clamp(min=1e-12).log()


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
