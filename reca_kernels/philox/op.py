"""Counter-based noise: bit-identical for every batch, packing, rank and backend."""

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import plain
from reca_kernels.philox import reference
from reca_kernels.philox.address import Philox, checked, named
from reca_kernels.philox.kernels import Kernels

OP = "philox"


def philox_uniform(noise: Philox, n: int, *, backend: str | None = None) -> Tensor:
    """Draw uniform numbers in [0, 1), fp32 [B, n].

    Element i of a sample is the upper 24 bits of word i of its stream, divided by 2^24. The words are those of
    Philox-4x32-10 (Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011).

    Args:
        noise: The address of the batch's noise.
        n: Numbers per sample.
        backend: The backend that runs. None: chosen by device and size.

    Raises:
        ValueError: sample_ids, seed or stream is not valid for a `Philox`, n is negative, or the backend is unknown.
        TypeError: noise is not a Philox, n or stream is not a whole number, or one of its tensors is sparse, nested,
            quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, or torch.jit.trace is active.
    """
    return _draw(noise, n, "uniform", backend)


def philox_normal(noise: Philox, n: int, *, backend: str | None = None) -> Tensor:
    """Draw standard normal numbers, fp32 [B, n].

    Box-Muller maps two words of the stream to two numbers. The largest magnitude is 6.7. All backends return the same
    bits. The words are those of Philox-4x32-10 (Salmon, Moraes, Dror and Shaw: Parallel random numbers: as easy as 1,
    2, 3, SC 2011).

    Args:
        noise: The address of the batch's noise.
        n: Numbers per sample.
        backend: The backend that runs. None: chosen by device and size.

    Raises:
        ValueError: sample_ids, seed or stream is not valid for a `Philox`, n is negative, or the backend is unknown.
        TypeError: noise is not a Philox, n or stream is not a whole number, or one of its tensors is sparse, nested,
            quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, or torch.jit.trace is active.
    """
    return _draw(noise, n, "normal", backend)


def _draw(noise: Philox, n: int, distribution: str, backend: str | None) -> Tensor:
    if not isinstance(noise, Philox):
        raise TypeError(f"{OP}: noise must be a Philox, got {type(noise).__name__}")
    if not (raw := plain(*noise[:2])):
        checks.dispatchable(OP, **named(noise))
    checks.whole(OP, n=n)
    if not isinstance(n, torch.SymInt) and n < 0:
        raise ValueError(f"{OP}: n must be at least 0, got {n}")
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
