"""The address of a batch's noise, for ops and backends."""

from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels.checks import whole


class Philox(NamedTuple):
    """The address of a batch's noise.

    Attributes:
        seed: An int64 tensor [] on the device, so that a captured CUDA graph can be replayed with another seed.
        sample_ids: An int64 tensor [B] of global sample ids; all 2^64 values are valid.
        stream: One of a sample's 256 independent streams, 0 to 255.
    """

    seed: Tensor
    sample_ids: Tensor
    stream: int


# The noise arguments of a registered op: an address, or the noise itself.
NOISE_SCHEMA = "Tensor? seed, Tensor? sample_ids, int stream, Tensor? explicit_noise"


def flattened(noise: Philox | Tensor) -> tuple[Tensor | None, Tensor | None, int, Tensor | None]:
    """Return the arguments of NOISE_SCHEMA."""
    return (None, None, 0, noise) if isinstance(noise, Tensor) else (*noise, None)


def unflattened(
    seed: Tensor | None, sample_ids: Tensor | None, stream: int, explicit_noise: Tensor | None
) -> Philox | Tensor:
    if explicit_noise is not None:
        return explicit_noise
    assert seed is not None and sample_ids is not None
    return Philox(seed, sample_ids, stream)


def checked(op: str, noise: Philox) -> Philox:
    """Return the address with contiguous ids. Raise ValueError for an invalid one."""
    seed, ids, stream = noise
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{op}: sample_ids must be int64 [B], got {ids.dtype} {list(ids.shape)}")
    if not isinstance(seed, Tensor) or seed.ndim or seed.dtype != torch.int64 or seed.device != ids.device:
        raise ValueError(f"{op}: seed must be an int64 tensor [] on {ids.device}, where sample_ids are, got {seed!r}")
    whole(op, stream=stream)
    if not 0 <= stream < 256:
        raise ValueError(f"{op}: stream must be in 0..255, got {stream}")
    return noise if ids.is_contiguous() else Philox(seed, ids.contiguous(), stream)


def tensors_of(op: str, noise: Philox | Tensor) -> tuple[Tensor, ...]:
    """Return the tensors of an address, or explicit noise. Raise TypeError for anything else."""
    if isinstance(noise, Philox):
        return noise[:2]
    if not isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a Philox or a tensor, got {type(noise).__name__}")
    return (noise,)


def named(noise: Philox | Tensor) -> dict[str, Tensor]:
    """Return the tensors by name, without a seed that is not a tensor, which `checked` rejects."""
    if isinstance(noise, Tensor):
        return {"noise": noise}
    ids = {"noise.sample_ids": noise.sample_ids}
    return {"noise.seed": noise.seed, **ids} if isinstance(noise.seed, Tensor) else ids
