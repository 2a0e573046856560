"""Storage of AdamW's two moments between steps: fp32, stochastically rounded bf16, or 8 bits with a scale per block.

8 bits: a code indexes the dynamic map of Dettmers et al. (8-bit Optimizers via Block-wise Quantization, arXiv
2110.02861), which bitsandbytes and torchao also use, and is multiplied by the largest magnitude of its block. There are
two differences. A block lies within one row, so that the result does not depend on how FSDP2 shards the rows. A
positive second moment is never stored as 0, because the next step would divide by it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reca.config.recipe import OptimConfig
from reca_kernels import Philox, philox_uniform
from reca_kernels.host import outside_of_modes

BLOCK = 256  # elements of a row that share a scale
FEWEST = 4096  # smallest number of elements of a parameter with 8-bit moments
SHORTEST = 64  # smallest row length of a parameter with 8-bit moments
MOMENTS = ("exp_avg", "exp_avg_sq")


def storage(shape: Sequence[int], dtype: torch.dtype, config: OptimConfig) -> torch.dtype:
    """Return the dtype in which a parameter's moments are stored; uint8 means codes with scales.

    shape: of the whole parameter, not of a rank's shard.
    """
    if config.name == "adamw_8bit" and _quantized(shape):
        return torch.uint8
    if config.moments == "bf16":
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_bytes(parameter: Tensor, config: OptimConfig, shard: int = 1) -> int:
    """Count the bytes of a parameter's optimizer state: both moments, and the scales of 8-bit moments.

    shard: number of parts along the first dimension, of which the largest is counted.
    """
    rows, row = _rows(parameter.shape)
    rows = -(-rows // shard)
    kept = storage(parameter.shape, parameter.dtype, config)
    scales = 4 * rows * -(-row // BLOCK) if kept == torch.uint8 else 0
    return 2 * (rows * row * kept.itemsize + scales)


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a parameter's scales, [rows, blocks per row]."""
    rows, row = _rows(shape)
    return rows, -(-row // BLOCK)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize fp32 values [n, row] to codes, uint8 [n, row], and scales, fp32 [n, blocks]."""
    n, row = values.shape
    blocks = F.pad(values, (0, -row % BLOCK)).view(n, -1, BLOCK)
    scale = blocks.abs().amax(-1)
    levels = _map(signed, values.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=1e-30)[..., None], middles, right=True)
    if not signed:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).view(n, -1)[:, :row], scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Return fp32 values [n, row] from codes, uint8 [n, row], and scales, fp32 [n, blocks]."""
    n, row = codes.shape
    blocks = F.pad(_map(signed, codes.device)[codes.int()], (0, -row % BLOCK)).view(n, -1, BLOCK)
    return (blocks * scale[..., None]).view(n, -1)[:, :row].contiguous()


def round_to_bf16(values: Tensor, seed: Tensor, first: int, stream: int) -> Tensor:
    """Round fp32 [n, row] to bf16 stochastically, so that the expected value is unchanged.

    The random bits are a function of (seed, stream, row, element), with rows counted from `first`: the same on every
    rank and device. seed: int64 [], on the device. Infinity and NaN are preserved.
    """
    rows = torch.arange(first, first + values.shape[0], device=values.device)
    random = (philox_uniform(Philox(seed, rows, stream), values.shape[1]) * 65536).int()
    bits = values.view(torch.int32)
    rounded = ((bits + random) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of rows of a parameter, and the elements per row."""
    return (shape[0] if len(shape) else 1), math.prod(shape[1:])


def _quantized(shape: Sequence[int]) -> bool:
    rows, row = _rows(shape)
    return rows * row >= FEWEST and row >= SHORTEST


@outside_of_modes
def _map(signed: bool, device: torch.device) -> Tensor:
    """Build the sorted dynamic map, fp32 [256]: some bits are a decimal exponent, the others a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        items = 2 ** (exponent + (not signed)) + 1
        edges = torch.linspace(0.1, 1, items)
        means = (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += [*means, *(-mean for mean in means)] if signed else means
    return torch.tensor(sorted(values), device=device)
