"""Counter-based noise. One definition, the same bits whatever the batch, packing, rank or backend."""

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import plain
from reca_kernels.philox import reference
from reca_kernels.philox.address import Philox, addressed, checked
from reca_kernels.philox.kernels import Kernels

OP = "philox"


def philox_uniform(noise: Philox, n: int, *, backend: str | None = None) -> Tensor:
    """Draw numbers in [0, 1), fp32 [B, n]. Element i of a sample is word i of its stream, its upper 24 bits."""
    return _draw(noise, n, "uniform", backend)


def philox_normal(noise: Philox, n: int, *, backend: str | None = None) -> Tensor:
    """Draw standard normal numbers, fp32 [B, n], by Box-Muller: tails to 6.7, the same bits on every backend."""
    return _draw(noise, n, "normal", backend)


def _draw(noise: Philox, n: int, distribution: str, backend: str | None) -> Tensor:
    if not (raw := plain(noise.seed, noise.sample_ids)):
        checks.dispatchable(OP, **addressed(noise))
    noise = checked(OP, noise)
    ids = noise.sample_ids
    backend = dispatch.choose(OP, ids, backend, dtype=torch.float32, numel=ids.shape[0] * n)
    if backend == "reference":
        return getattr(reference, f"philox_{distribution}")(*noise, n)
    return _fill(raw, *noise, n, distribution, backend)


@kernel_op(
    f"{OP}(Tensor seed, Tensor ids, int stream, SymInt n, str distribution, str backend) -> Tensor",
    lambda seed, ids, stream, n, distribution, backend: ids.new_empty(ids.shape[0], n, dtype=torch.float32),
)
def _fill(seed: Tensor, ids: Tensor, stream: int, n: int, distribution: str, backend: str) -> Tensor:
    out = torch.empty(ids.shape[0], n, dtype=torch.float32, device=ids.device)
    kernels: Kernels = dispatch.load(backend, OP)
    kernels.draw(Philox(seed, ids, stream), distribution, out)
    return out
