"""How AdamW's two moments are stored between steps: fp32, bf16 rounded stochastically, or 8 bits and a scale per block.

8 bits: the codes of a block of a row are looked up in the dynamic map of Dettmers et al. (8-bit Optimizers via
Block-wise Quantization, arXiv 2110.02861), which bitsandbytes and torchao use too, and multiplied by the block's
largest magnitude. Two things differ from theirs. A block never leaves its row, so that neither the codes nor what they
stand for depend on how FSDP2 shards the rows. A second moment above 0 is never stored as 0, since the next step would
divide by it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reca.config import OptimConfig
from reca_kernels import Philox, philox_uniform
from reca_kernels.host import outside_of_modes

BLOCK = 256  # elements of a row with a scale of their own
FEWEST = 4096  # elements of a parameter that is worth 8 bits
SHORTEST = 64  # elements of such a parameter's rows
MOMENTS = ("exp_avg", "exp_avg_sq")


def storage(shape: Sequence[int], dtype: torch.dtype, config: OptimConfig) -> torch.dtype:
    """Return the type that the moments of a parameter are stored in; uint8 means codes with scales.

    It follows from the whole parameter, never from a rank's shard of it.
    """
    if config.name == "adamw_8bit" and _quantized(shape):
        return torch.uint8
    if config.moments == "bf16":
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_bytes(parameter: Tensor, config: OptimConfig, shard: int = 1) -> int:
    """Count the bytes of the optimizer's state of a parameter: both moments, and the scales of 8-bit ones.

    shard: count the largest of so many parts along the first dimension. They are on the host with optim.offload.
    """
    rows, row = _rows(parameter.shape)
    rows = -(-rows // shard)
    kept = storage(parameter.shape, parameter.dtype, config)
    scales = 4 * rows * -(-row // BLOCK) if kept == torch.uint8 else 0
    return 2 * (rows * row * kept.itemsize + scales)


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the scales of a parameter's codes: a row of them for every row."""
    rows, row = _rows(shape)
    return rows, -(-row // BLOCK)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [n, row], and scales, fp32 [n, blocks], of fp32 values [n, row]."""
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
    """Return the fp32 [n, row] that codes, uint8 [n, row], and scales, fp32 [n, blocks], stand for."""
    n, row = codes.shape
    blocks = F.pad(_map(signed, codes.device)[codes.int()], (0, -row % BLOCK)).view(n, -1, BLOCK)
    return (blocks * scale[..., None]).view(n, -1)[:, :row].contiguous()


def round_to_bf16(values: Tensor, seed: Tensor, first: int, stream: int) -> Tensor:
    """Round fp32 [n, row] to bf16, up or down with the probability that keeps the mean.

    The random bits are a function of (seed, stream, row, element), with rows counted from `first`: the same on every
    rank and device. seed: int64 [], on the device. Infinity and NaN stay what they are.
    """
    rows = torch.arange(first, first + values.shape[0], device=values.device)
    random = (philox_uniform(Philox(seed, rows, stream), values.shape[1]) * 65536).int()
    bits = values.view(torch.int32)
    rounded = ((bits + random) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many rows a parameter has, and the elements of each."""
    return (shape[0] if len(shape) else 1), math.prod(shape[1:])


def _quantized(shape: Sequence[int]) -> bool:
    rows, row = _rows(shape)
    return rows * row >= FEWEST and row >= SHORTEST


@outside_of_modes
def _map(signed: bool, device: torch.device) -> Tensor:
    """Build the dynamic map, fp32 [256], sorted: some bits are an exponent of ten, and the rest a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        items = 2 ** (exponent + (not signed)) + 1
        edges = torch.linspace(0.1, 1, items)
        means = (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += [*means, *(-mean for mean in means)] if signed else means
    return torch.tensor(sorted(values), device=device)
