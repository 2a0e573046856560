"""Registration of ops with torch, when an op may go around the dispatcher, and what every op's autograd shares.

A kernel takes addresses. So in eager mode, on plain memory, an op runs raw through its autograd.Function, which costs
half of what a registered op costs. Everything else is the dispatcher's: graphs that are traced, modes, fake and meta
tensors, subclasses, negated views. There the op is a registered one, one node of any graph. Both call the same kernels.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("reca", "DEF")

# ---- plain memory ----

# What the dispatcher would do on its way to a kernel that the raw path does by itself, or need not do.
_ON_THE_WAY = (
    "CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "BackendSelect"
)  # fmt: skip
_PLAIN = functools.reduce(
    int.__or__, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in _ON_THE_WAY)
)
_MORE = ~_PLAIN
_keys_of, _keys_of_thread = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set


def plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called on the addresses of these tensors, with nothing in between.

    Not under torch.compile, a dispatch or function mode, a transform of torch.func, torch.jit.trace or forward mode
    AD; not for a subclass, a fake, meta, sparse, quantized or nested tensor, a negated view, or a zero tensor.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if has_torch_function(tensors) or _keys_of_thread().raw_repr() & _MORE:
        return False
    for tensor in tensors:  # noqa: SIM110  a generator costs a microsecond
        if tensor is not None and _keys_of(tensor).raw_repr() & _MORE:
            return False
    return True


def _on_memory(kernel: Callable) -> Callable:
    """The kernel, on tensors of which the dispatcher may have made another: a zero tensor arrives as one expanded 0."""

    def laid_out(x: Tensor) -> Tensor:
        return x.contiguous() if 0 in x.stride() else x

    return lambda *arguments: kernel(*tree_map_only(Tensor, laid_out, arguments))


def has_values(*tensors: Tensor | None) -> bool:
    """Whether values may be read, even where a kernel may not go: of a subclass, or under a function mode."""
    if torch.compiler.is_compiling() or _keys_of_thread().raw_repr() & _MORE:
        return False
    return all(tensor is None or not _keys_of(tensor).raw_repr() & _MORE for tensor in tensors)


def _refuse_transforms(op: str, listed: bool, tensors: Iterable[Any]) -> None:
    """Raise RuntimeError where derivatives would be lost in silence: a kernel has backward() and no more. And under
    vmap for an op that takes lists (`listed`), which torch cannot unpack."""
    transforms = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    kind = torch._C._functorch.TransformType
    name = None
    if transforms & {kind.Grad, kind.Jvp}:
        name = "transforms of torch.func that differentiate (grad, vjp, jvp, jacrev, ...)"
    elif forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        name = "forward mode AD"
    elif listed and kind.Vmap in transforms:
        raise RuntimeError(f"{op} takes lists of tensors, which vmap cannot batch. Use backend='reference' there")
    if name:
        raise RuntimeError(
            f"{op} has no derivative for {name}: its gradient comes from a kernel, by backward(). "
            "Use backend='reference' there"
        )


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


@contextmanager
def no_modes() -> Iterator[None]:
    """For tensors that are kept: no later call finds a fake one, one of inference mode or of a transform."""
    with (
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield


def in_mode(tensors: Any) -> Any:
    """Kept tensors, in any nest, as the active dispatch mode wants them: fake, or known to a graph that is traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return tensors
    return tree_map_only(Tensor, torch.ops.aten.lift_fresh, tensors)


def outside_of_modes(function: Callable) -> Callable:
    """Keep tensors that the host makes from numbers: no_modes() makes them, in_mode() hands them out.

    Arguments are hashable.
    """

    @functools.lru_cache(maxsize=32)
    def kept(*arguments: Any) -> Any:
        with no_modes():
            return function(*arguments)

    handed_out = functools.wraps(function)(lambda *arguments: in_mode(kept(*arguments)))
    handed_out.cache_clear = kept.cache_clear
    return handed_out


# ---- registration ----


def register(
    schema: str,
    kernel: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    flops: Callable | None = None,
) -> Callable:
    """Register `name(arguments) -> results` as torch.ops.reca.name and return a function that calls it.

    kernel         runs it on real tensors
    fake           allocates results of the same shape, dtype, stride
    backward       (ctx, *grads) -> a gradient or None per argument; without it, to differentiate the op is an error
    setup_context  (ctx, inputs, output), saves what backward needs
    flops          (*arguments) -> what FlopCounterMode counts; without it nothing

    The function raises RuntimeError for transforms that would lose a derivative.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, _on_memory(kernel), key)
    torch.library.register_fake(f"reca::{name}", fake, lib=_library)
    public = name.removesuffix("_backward").removesuffix("_scale")

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_twice(public))

    torch.library.register_autograd(
        f"reca::{name}", backward or refuse, setup_context=setup_context if backward else None, lib=_library
    )
    op = getattr(torch.ops.reca, name)
    if flops is not None:
        register_flop_formula(op, get_raw=True)(flops)

    def call(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            _refuse_transforms(public, "Tensor[]" in schema, tree_iter(arguments))
        return op(*arguments)

    return call


def _twice(op: str) -> str:
    return (
        f"{op} has no second derivative: its gradient comes from a kernel. "
        f"Use backend='reference' where a gradient is differentiated again"
    )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_twice(ctx.op))


def once(op: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients made by a kernel, such that differentiating them raises our own sentence.

    `sources` are the tensors that the gradients depend on. Costs nothing unless create_graph is on.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    present = [g for g in grads if g is not None]
    marked = iter(_Once.apply(op, len(present), *present, *sources))
    return tuple(None if g is None else next(marked) for g in grads)
