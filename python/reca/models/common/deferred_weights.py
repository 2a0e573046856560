"""Deferred loading: build a model on the meta device, shard it, then read each rank's part of every tensor.

Inside `deferring`, an adapter's `load` leaves parameters on the meta device. Tensors of a file are memory-mapped and
stored as an attribute of their parameter; `read` copies from them after sharding, so that no process holds more than
its own shards and the tensor being copied. Random weights are initialised on rank 0 only and broadcast tensor by
tensor, so that they equal those of a run on one rank. Buffers are computed on every rank; floating-point ones are then
broadcast from rank 0.
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
    """Defer the weights of models loaded in the context until `DeferredWeights.read`."""
    global _active
    _active = True
    try:
        yield
    finally:
        _active = False


def is_deferring() -> bool:
    return _active


def makes_random() -> bool:
    """Tell whether this process initialises random weights, rather than receiving those of rank 0."""
    return not _active or not dist.is_initialized() or dist.get_rank() == 0


def attach(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Store each parameter's source tensor as its attribute. state: tensors of a file, by name."""
    for name, parameter in module.named_parameters():
        parameter.source = state[name]  # type: ignore[attr-defined]


class DeferredWeights:
    """The sources of a model's parameters, recorded before sharding: a tensor of a file, or rank 0's random weights."""

    def __init__(self, module: nn.Module):
        self.files: dict[str, Tensor] = {}
        self.random: dict[str, Tensor] = {}  # meta tensors on all ranks but 0
        for name, parameter in module.named_parameters():
            if (source := getattr(parameter, "source", None)) is not None:
                self.files[name] = source
            else:
                self.random[name] = parameter.detach()

    @torch.no_grad()
    def read(self, module: nn.Module, device: torch.device) -> None:
        """Allocate what `device` needs for a model, sharded or not, and read the values that files contain.

        A rank may fail here alone: the ranks fail together afterwards, so that none waits in `receive`.
        """
        _give_memory(module, device)
        for name, parameter in module.named_parameters():
            if name in self.files:
                local_part(parameter).copy_(self.files.pop(name)[own_rows(parameter)])
        self._allocate_receiver(module, device)

    @torch.no_grad()
    def receive(self, module: nn.Module) -> None:
        """Set the random parameters and buffers of a model to rank 0's, after `read` or `read_only`.

        Collective: every rank must call it.
        """
        for name, parameter in module.named_parameters():
            if name in self.random:
                whole = _sent(self.random.pop(name), parameter, self.receiver)
                local_part(parameter).copy_(whole[own_rows(parameter)])
        del self.receiver
        _send_buffers(module)

    @torch.no_grad()
    def read_only(self, module: nn.Module, device: torch.device, names: Container[str]) -> None:
        """Do what `read` does for the parameters in `names` alone; move all others to the meta device."""
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # keeps the old one alive: ids must stay unique
        for prefix, part in module.named_modules():
            for own, parameter in list(part.named_parameters(recurse=False)):
                name = f"{prefix}.{own}" if prefix else own
                if id(parameter) in made:  # tied weights stay tied
                    setattr(part, own, made[id(parameter)][1])
                    continue
                if name in names and name in self.files:
                    value = self.files[name].to(device, parameter.dtype)
                else:
                    value = torch.empty_like(parameter, device=device if name in names else "meta")
                made[id(parameter)] = parameter, nn.Parameter(value, requires_grad=parameter.requires_grad)
                setattr(part, own, made[id(parameter)][1])
            for own, buffer in list(part.named_buffers(recurse=False)):
                part._buffers[own] = buffer.to(device)
        self.files.clear()
        self.random = {name: value for name, value in self.random.items() if name in names}
        self._allocate_receiver(module, device)

    def _allocate_receiver(self, module: nn.Module, device: torch.device) -> None:
        """Allocate bytes for any one of the random parameters, unsharded, if there are other ranks."""
        random = [p for name, p in module.named_parameters() if name in self.random and dist.is_initialized()]
        largest = max((p.numel() * p.element_size() for p in random), default=0)
        self.receiver = torch.empty(largest, dtype=torch.uint8, device=device)


def _send_buffers(module: nn.Module) -> None:
    """Broadcast floating-point buffers from rank 0, since some of them are random."""
    if dist.is_initialized():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                sent = buffer.contiguous()
                dist.broadcast(sent, 0)
                buffer.copy_(sent)


def _sent(own: Tensor, parameter: nn.Parameter, receiver: Tensor) -> Tensor:
    """Return rank 0's value of a parameter, unsharded. receiver: bytes to receive it in."""
    if not dist.is_initialized():
        return own
    whole = receiver[: parameter.numel() * parameter.element_size()].view(parameter.dtype).view(parameter.shape)
    if dist.get_rank() == 0:
        whole.copy_(own)
    dist.broadcast(whole, 0)
    return whole


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing memory and detached."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def own_rows(parameter: nn.Parameter) -> slice:
    """Return the slice of rows that this rank holds: FSDP2 shards the first dimension as torch.chunk does."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    start, rows = 0, parameter.shape[0]
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard():
            part = -(-rows // parameter.device_mesh.size(axis))
            start = parameter.device_mesh.get_local_rank(axis) * part
    return slice(start, start + parameter.to_local().shape[0])


def _give_memory(module: nn.Module, device: torch.device) -> None:
    """Allocate every tensor on the meta device and move the others to `device`. Tied weights stay tied."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            tied.setdefault(id(parameter), []).append((part, name))
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for (first, name), *others in tied.values():
        for part, alias in others:
            setattr(part, alias, getattr(first, name))
