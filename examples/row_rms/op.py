"""Root mean square of rows: the smallest op with a kernel and a gradient."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import plain
from reca_kernels.row_rms import reference
from reca_kernels.row_rms.kernels import Kernels

OP = "row_rms"


def row_rms(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Return the root mean square of every row of x [N, D], fp32 [N]."""
    checks.floating(OP, x=x)
    backend = dispatch.choose(OP, x, backend)
    if backend == "reference":
        return reference.row_rms(x)
    return _forward(plain(x), x, backend)


def _fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float32)


@kernel_op(f"{OP}(Tensor x, str backend) -> Tensor", _fake)
def _forward(x: Tensor, backend: str) -> Tensor:
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    kernels: Kernels = dispatch.load(backend, OP)
    kernels.forward(x, out)
    return out


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    x, out = ctx.saved_tensors
    return ((grad / (out * x.shape[1]))[:, None] * x,)


_forward.register_autograd(_backward, setup_context=_setup_context, of=["x"])
