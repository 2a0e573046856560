"""Counter-based noise. One definition, the same bits whatever the batch, packing, rank or backend.

A backend's file holds draw(noise, distribution, out): fills out, fp32 [B, n].
`distribution` is "bits" (uint32 words), "uniform" or "normal".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import plain
from reca_kernels.philox import reference

OP = "philox"


class Philox(NamedTuple):
    """The address of a batch's noise.

    seed        int64 [] on the device, so that a captured CUDA graph can be replayed with another seed
    sample_ids  int64 [B], contiguous: global sample ids, any of the 2^64
    stream      which of a sample's independent streams, 0..255
    """

    seed: Tensor
    sample_ids: Tensor
    stream: int


def philox_uniform(noise: Philox, n: int, *, backend: str | None = None) -> Tensor:
    """fp32 [B, n] in [0, 1): element i of a sample is word i of its stream, its upper 24 bits."""
    return _draw(noise, n, "uniform", backend)


def philox_normal(noise: Philox, n: int, *, backend: str | None = None) -> Tensor:
    """fp32 [B, n], standard normal: Box-Muller, with tails to 6.7 and the same bits on every backend."""
    return _draw(noise, n, "normal", backend)


# What a registered op takes for noise: an address, or the noise itself.
NOISE_SCHEMA = "Tensor? seed, Tensor? sample_ids, int stream, Tensor? explicit_noise"


def flattened(noise: Philox | Tensor) -> tuple[Tensor | None, Tensor | None, int, Tensor | None]:
    """Return the arguments of NOISE_SCHEMA."""
    return (None, None, 0, noise) if isinstance(noise, Tensor) else (*noise, None)


def unflattened(
    seed: Tensor | None, sample_ids: Tensor | None, stream: int, explicit_noise: Tensor | None
) -> Philox | Tensor:
    return Philox(seed, sample_ids, stream) if explicit_noise is None else explicit_noise


def checked(op: str, noise: Philox) -> Philox:
    """Return the address with its ids side by side. Raises ValueError for one that kernels cannot read."""
    seed, ids, stream = noise
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{op}: sample_ids must be int64 [B], got {ids.dtype} {list(ids.shape)}")
    if not isinstance(seed, Tensor) or seed.ndim or seed.dtype != torch.int64 or seed.device != ids.device:
        raise ValueError(f"{op}: seed must be an int64 tensor [] on {ids.device}, where sample_ids are, got {seed!r}")
    if not 0 <= stream < 256:
        raise ValueError(f"{op}: stream must be in 0..255, got {stream}")
    return noise if ids.is_contiguous() else Philox(seed, ids.contiguous(), stream)


def addressed(noise: Philox) -> dict[str, Tensor]:
    """Return its tensors by name, without a seed that is none: of that `checked` complains."""
    ids = {"noise.sample_ids": noise.sample_ids}
    return {"noise.seed": noise.seed, **ids} if isinstance(noise.seed, Tensor) else ids


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
    dispatch.load(backend, OP).draw(Philox(seed, ids, stream), distribution, out)
    return out
