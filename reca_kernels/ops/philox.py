"""Counter-based noise. One definition, the same bits whatever the batch, packing, rank or backend.

A backend's file holds draw(noise, law, out): fills out, fp32 [B, n]; law: "bits" (uint32 words), "uniform" or "normal".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels import dispatch
from reca_kernels.reference import philox as reference

OP = "philox"


class Philox(NamedTuple):
    """The address of a batch's noise.

    seed        int64 [] on the device, so that a captured CUDA graph can be replayed with another seed
    sample_ids  int64 [B], contiguous: global sample ids
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


def checked(op: str, noise: Philox) -> Philox:
    """The address with its ids side by side. Raises ValueError for one that kernels cannot read."""
    seed, ids, stream = noise
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{op}: sample_ids must be int64 [B], got {ids.dtype} {list(ids.shape)}")
    if not isinstance(seed, Tensor) or seed.ndim or seed.dtype != torch.int64 or seed.device != ids.device:
        raise ValueError(f"{op}: seed must be an int64 tensor [] on {ids.device}, where sample_ids are, got {seed!r}")
    if not 0 <= stream < 256:
        raise ValueError(f"{op}: stream must be in 0..255, got {stream}")
    return Philox(seed, ids.contiguous(), stream)


def _draw(noise: Philox, n: int, law: str, backend: str | None) -> Tensor:
    noise = checked(OP, noise)
    ids = noise.sample_ids
    out = torch.empty(len(ids), n, dtype=torch.float32, device=ids.device)
    backend = dispatch.choose(OP, out, backend)
    if backend == "reference" or torch.compiler.is_compiling():
        return getattr(reference, f"philox_{law}")(*noise, n)
    dispatch.load(backend, OP).draw(noise, law, out)
    return out
