"""Implementations of an attention plan, and the conditions under which each can run.

Each takes q, k, v (rows in the leading dimensions, then heads and channels), the plan, the scale, and whether the
gradient must be deterministic; it returns the attention output of q's rows. All are exact and differ in rounding only.

    fa4      FlashAttention 4's variable-length function (flash_attn.cute; Hopper and Blackwell)
    fa3      FlashAttention 3's (flash_attn_interface; Hopper)
    fa2      FlashAttention 2's (flash_attn)
    varlen   the one inside torch (torch.nn.attention.varlen)
    sdpa     torch's scaled_dot_product_attention, group by group; any device and dtype. On GPUs cuDNN is excluded: it
             makes a plan for every new shape, in 0.4 to 1 s (modelscope/FunASR#3704)
    cudnn    the same with cuDNN, except for groups with a single key, which it does not support
    flex     FlexAttention: one compiled kernel that skips fully masked blocks
    dense    scaled_dot_product_attention with one mask over the padded batch
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from reca_kernels.attention.dense import dense
from reca_kernels.attention.flash_functions import MODULES, flash_problem, varlen_parameters
from reca_kernels.attention.flex import flex
from reca_kernels.attention.sdpa import HALVES, cudnn, sdpa
from reca_kernels.attention.varlen import flash, varlen

IMPLS: dict[str, Callable[..., Any]] = {
    **{impl: functools.partial(flash, impl) for impl in MODULES},
    **{"varlen": varlen, "cudnn": cudnn, "sdpa": sdpa, "flex": flex, "dense": dense},
}


def unusable(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    deterministic: bool = False,
    torch_deterministic: bool = False,
) -> str | None:
    """Return why an impl cannot run on such tensors; None if it can.

    Args:
        name: The impl.
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        head_dim: Channels per head.
        deterministic: The gradient must be bit-identical in every run.
        torch_deterministic: torch.use_deterministic_algorithms is on without warn_only.
    """
    if name in (*MODULES, "varlen", "cudnn"):
        if device.type != "cuda":
            return f"the tensors are on {device.type}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if name == "varlen" and (missing := {"window_size", "scale"} - varlen_parameters()):
            return f"varlen_attn of torch {torch.__version__} has no {' and no '.join(sorted(missing))}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or newer"
        if dtype not in HALVES:
            return f"it supports bf16 and fp16, the tensors are {str(dtype).removeprefix('torch.')}"
        largest = 128 if name == "cudnn" else 256
        if head_dim % 8 or head_dim > largest:
            return f"it supports head dimensions that are multiples of 8 up to {largest}, got {head_dim}"
        if name in MODULES:
            reason = flash_problem(name, torch.cuda.get_device_capability(device), head_dim, deterministic)
            if reason is not None:
                return reason
    if deterministic and name == "cudnn":
        return "torch has no deterministic gradient with cuDNN"
    torchs = ("varlen", "sdpa", "dense")
    if deterministic and not torch_deterministic and device.type == "cuda" and name in torchs:
        return "its gradient is deterministic only under torch.use_deterministic_algorithms(True) without warn_only"
    if name == "flex" and device.type != "cuda":
        return f"it has no backward on {device.type}"
    return None
