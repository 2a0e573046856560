"""AdamW with moments in fewer bits or in host memory, whose steps may run in the backward pass.

Every step is torch's fused AdamW on fp32 tensors. Tensors in another dtype or on the host are converted or copied one
piece at a time. With fp32 moments, on the host or not, results are bit-identical to torch.optim.AdamW(fused=True).
"""

import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed.tensor import DTensor

from reca.config.recipe import OptimConfig
from reca.models.common.deferred_weights import local_part, own_rows
from reca.optim import moments
from reca.rng import CounterRNG
from reca_kernels.memory import has_values

PIECE = 1 << 24  # elements that are processed at a time
ALIGNED = 64  # rows; pieces end at SIMD vector boundaries, because a CPU rounds a remainder differently
ROUNDING = 0x726F756E64  # separates these random numbers from a run's others
STREAMS = {"exp_avg": 0, "exp_avg_sq": 1, "parameter": 2}


class AdamW(torch.optim.Optimizer):
    """AdamW with moments as configured by `config`, allocated as zeros in the constructor.

    groups: parameter groups with "params", "names" and "weight_decay". seed: of the stochastic rounding of bf16 moments
    and bf16 parameters.

    The state of a parameter is step, fp32 []; exp_avg and exp_avg_sq, of its shape; and, for 8-bit moments,
    exp_avg_scale and exp_avg_sq_scale, fp32 [rows, blocks]. Under FSDP2 they are sharded like the parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, seed: int):
        defaults = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
        super().__init__([{key: group[key] for key in group if key != "names"} for group in groups], defaults)
        self.offload = config.offload
        self.seeds: dict[nn.Parameter, Tensor] = {}
        for group in groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                self.state[parameter] = self._zeros(parameter, config)
                own = CounterRNG(seed, ROUNDING, zlib.crc32(name.encode())).seed
                self.seeds[parameter] = torch.tensor(own, device=parameter.device)

    @torch.no_grad()
    def _zeros(self, parameter: nn.Parameter, config: OptimConfig) -> dict[str, Tensor]:
        kept = moments.storage(parameter.shape, parameter.dtype, config)
        state = {"step": torch.zeros((), device=parameter.device)}
        for name in moments.MOMENTS:
            state[name] = self._stored(
                torch.zeros_like(parameter, dtype=kept, requires_grad=False, memory_format=torch.contiguous_format)
            )
            if kept == torch.uint8:
                self._fill_with_zero_codes(state[name], signed=name == "exp_avg")
                state[f"{name}_scale"] = self._stored(_zero_scales(parameter))
        return state

    def _stored(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the host with optim.offload, in pinned memory so that GPU copies are asynchronous."""
        if not self.offload:
            return tensor
        tensor = tensor.to("cpu")
        local = local_part(tensor)
        memory = local.untyped_storage()
        if torch.cuda.is_available() and memory.nbytes() and has_values(local):  # fake tensors have no memory to pin
            # Pinned in place: torch's pinned allocator rounds sizes up to powers of two.
            pin_memory(memory.data_ptr(), memory.nbytes())
            weakref.finalize(memory, unpin_memory, memory.data_ptr()).atexit = False
        return tensor

    def _fill_with_zero_codes(self, codes: Tensor, signed: bool) -> None:
        zero, _ = moments.quantize(torch.zeros(1, 1, device=codes.device), signed)
        local_part(codes).fill_(int(zero))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, group)

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, group: dict[str, Any], skip: Tensor | None = None) -> None:
        """Update one parameter. skip: fp32 [] on the device; 1 leaves the parameter and its state unchanged."""
        assert parameter.grad is not None
        state = self.state[parameter]
        state["step"] += 1
        tensors = {"parameter": parameter, "gradient": parameter.grad} | {
            name: tensor for name, tensor in state.items() if name != "step"
        }
        local = {name: _as_rows(local_part(tensor)) for name, tensor in tensors.items()}
        seed, offset = self.seeds[parameter] + state["step"].long(), own_rows(parameter).start or 0
        length = max(1, PIECE // max(1, local["parameter"].shape[1]) // ALIGNED) * ALIGNED
        for first in range(0, local["parameter"].shape[0], length):
            piece = {name: tensor[first : first + length] for name, tensor in local.items()}
            self._update_piece(piece, group, state["step"], seed, offset + first, skip)
        if not (shard := local_part(parameter)).is_contiguous():
            shard.copy_(local["parameter"].view(shard.shape))  # _as_rows has made a copy
        if skip is not None:
            state["step"] -= skip

    def _update_piece(
        self,
        stored: dict[str, Tensor],
        group: dict[str, Any],
        step: Tensor,
        seed: Tensor,
        first: int,
        skip: Tensor | None,
    ) -> None:
        """Update n rows; tensors are [n, row]. first: index of their first row in the whole parameter."""
        device, wide = step.device, stored["parameter"].dtype
        wide = wide if wide == torch.float64 else torch.float32
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in stored.items()}
        work = {}
        for name in ("parameter", "gradient", *moments.MOMENTS):
            here = on_device[name]
            if here.dtype == torch.uint8:
                work[name] = moments.dequantize(here, on_device[f"{name}_scale"], signed=name == "exp_avg").to(wide)
            else:
                work[name] = here.to(wide).contiguous()
        torch._fused_adamw_(
            [work["parameter"]],
            [work["gradient"]],
            [work["exp_avg"]],
            [work["exp_avg_sq"]],
            [],
            [step],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        for name in ("parameter", *moments.MOMENTS):
            kept, result = stored[name], work[name]
            if result is kept or result.data_ptr() == kept.data_ptr():
                continue
            if kept.dtype == torch.uint8:
                codes, scale = moments.quantize(result.float(), signed=name == "exp_avg")
                scales = f"{name}_scale"
                if skip is not None:  # quantizing dequantized values need not return the same codes
                    codes = torch.where(skip > 0, on_device[name], codes)
                    scale = torch.where(skip > 0, on_device[scales], scale)
                stored[scales].copy_(scale, non_blocking=True)
                result = codes
            elif kept.dtype == torch.bfloat16:
                result = moments.round_to_bf16(result.float(), seed, first, STREAMS[name])
            kept.copy_(result, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host may be in flight
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into this one and keep its dtypes; torch's method casts it to the parameters' dtype."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, tensor in self.state[parameter].items():
                if (given := state_dict["state"][number][name]) is not tensor:
                    tensor.copy_(given)


def _as_rows(tensor: Tensor) -> Tensor:
    """View a tensor as [rows, row], with its first dimension as rows; a copy if it is not contiguous."""
    rows = tensor.shape[0] if tensor.ndim else 1
    return tensor.reshape(rows, -1) if tensor.numel() else tensor.reshape(0, 1)


def _zero_scales(parameter: nn.Parameter) -> Tensor:
    shape: Sequence[int] = moments.scale_shape(parameter.shape)
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, device=parameter.device)
    local = torch.zeros(parameter.to_local().shape[0], shape[1], device=parameter.device)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1], 1),
    )
