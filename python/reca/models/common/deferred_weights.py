"""Weights that come later: a model is built without memory, sharded, and each rank reads its part of every tensor.

Inside `deferring`, `load` of an adapter leaves parameters on the meta device. What would have been read from a file is
mapped from disk and remembered beside its parameter; `fill` copies from it after sharding, so that no process ever
holds more than its own part and what it is copying. Random weights are made by the first rank, one process of the whole
run, and sent tensor by tensor, so that they are those of a run on one rank. Buffers are computed on every rank.
"""

import contextlib
from collections.abc import Container, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_active = False


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Leave the weights of models that are loaded inside for `fill`."""
    global _active
    _active = True
    try:
        yield
    finally:
        _active = False


def is_deferring() -> bool:
    return _active


def makes_random() -> bool:
    """Tell whether this process is to make random weights, not to wait for those of the first rank."""
    return not _active or not dist.is_initialized() or dist.get_rank() == 0


def attach(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Note where each parameter comes from. state: tensors of a file, by name."""
    for name, parameter in module.named_parameters():
        parameter.source = state[name]  # type: ignore[attr-defined]


class DeferredWeights:
    """Where the parameters of a model come from, taken before it is sharded: a tensor of a file, or the first rank."""

    def __init__(self, module: nn.Module):
        self.files: dict[str, Tensor] = {}
        self.random: dict[str, Tensor] = {}  # of this rank; others receive the first one's
        for name, parameter in module.named_parameters():
            if (source := getattr(parameter, "source", None)) is not None:
                self.files[name] = source
            else:
                self.random[name] = parameter.detach()

    @torch.no_grad()
    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Give the parameters of a model, sharded or not, memory on `device` and their values.

        Every rank must call it.
        """
        _give_memory(module, device)
        for name, parameter in module.named_parameters():
            rows = own_rows(parameter)
            local = local_part(parameter)
            if name in self.files:
                local.copy_(self.files.pop(name)[rows])
                continue
            whole = _sent(self.random.pop(name), parameter, device)
            local.copy_(whole[rows])
        _send_buffers(module)

    @torch.no_grad()
    def fill_only(self, module: nn.Module, device: torch.device, names: Container[str]) -> None:
        """Give the parameters of these names memory on `device` and their values; all others stay without memory.

        Every rank must call it.
        """
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, so that no other gets its id
        for prefix, part in module.named_modules():
            for own, parameter in list(part.named_parameters(recurse=False)):
                name = f"{prefix}.{own}" if prefix else own
                if id(parameter) in made:  # names that are one tensor stay one
                    setattr(part, own, made[id(parameter)][1])
                    continue
                if name not in names:
                    value = parameter.to("meta")
                elif name in self.files:
                    value = self.files[name].to(device, parameter.dtype)
                else:
                    value = _sent(self.random[name], parameter, device).to(device)
                made[id(parameter)] = parameter, nn.Parameter(value, requires_grad=parameter.requires_grad)
                setattr(part, own, made[id(parameter)][1])
            for own, buffer in list(part.named_buffers(recurse=False)):
                part._buffers[own] = buffer.to(device)
        self.files.clear()
        self.random.clear()
        _send_buffers(module)


def _send_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of the first one, some of which are random."""
    if dist.is_initialized():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                sent = buffer.contiguous()
                dist.broadcast(sent, 0)
                buffer.copy_(sent)


def _sent(own: Tensor, parameter: nn.Parameter, device: torch.device) -> Tensor:
    """Return the first rank's value of a parameter, whole."""
    if not dist.is_initialized():
        return own
    if dist.get_rank() == 0:
        whole = own.to(device).contiguous()
    else:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    dist.broadcast(whole, 0)
    return whole


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, with the same memory and without its graph."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def own_rows(parameter: nn.Parameter) -> slice:
    """Return which rows of a parameter this rank holds: FSDP2 shards the first dimension as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    start, rows = 0, parameter.shape[0]
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard():
            part = -(-rows // parameter.device_mesh.size(axis))
            start = min(parameter.device_mesh.get_local_rank(axis) * part, rows)
    return slice(start, start + parameter.to_local().shape[0])


def _give_memory(module: nn.Module, device: torch.device) -> None:
    """Give every parameter on the meta device memory. Names that are one tensor stay one."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            tied.setdefault(id(parameter), []).append((part, name))
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for (first, name), *others in tied.values():
        for part, alias in others:
            setattr(part, alias, getattr(first, name))
