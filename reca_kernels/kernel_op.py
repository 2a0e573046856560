"""Kernel ops: functions that call a kernel, registered with torch, that bypass the dispatcher in eager mode.

`kernel_op` is `torch.library.custom_op` with a fast path. In eager mode on plain memory a kernel op calls its body
directly, in half the time of a registered op. Everywhere else (torch.compile, export, modes, fake and meta tensors,
transforms, subclasses, negated views) it is torch.ops.reca.NAME, a single node of any graph. An op's gradient is
defined once, by `register_autograd`, and serves both paths.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import register_flop_formula

from reca_kernels.memory import refuse_transforms

_library = torch.library.Library("reca", "DEF")
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class KernelOp(Protocol[Result_co]):
    """A function decorated with `kernel_op`."""

    def __call__(self, plain: bool, /, *arguments: Any) -> Result_co: ...

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None], of: Sequence[str]
    ) -> None: ...


def kernel_op(
    schema: str, fake: Callable[..., Any], *, flops: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Result]], KernelOp[Result]]:
    """Decorate a function that calls a kernel on its tensors.

    The op has an additional first argument, `op(plain, *arguments)`: the result of `reca_kernels.memory.plain` for its
    tensors. It raises RuntimeError for transforms that would drop a derivative. `op.register_autograd` defines its
    gradient; differentiating an op without one is an error.

    Args:
        schema: `name(arguments) -> results`. Arguments are positional. Results are tensors or None; the dispatcher sees
            None as an empty tensor.
        fake: Allocates results with the shapes, dtypes and strides of the real ones.
        flops: Returns the FLOPs that FlopCounterMode counts, given the arguments. Default: none are counted.
    """

    def decorate(body: Callable[..., Result]) -> KernelOp[Result]:
        name = schema.split("(", 1)[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(name, _dispatched(body), key)
        torch.library.register_fake(f"reca::{name}", _without_none(fake), lib=_library)
        registered = getattr(torch.ops.reca, name)
        if flops is not None:
            register_flop_formula(registered, get_raw=True)(flops)
        autograd = _Autograd(registered.default._schema, body)
        torch.library.register_autograd(
            f"reca::{name}", autograd.backward, setup_context=autograd.setup_context, lib=_library
        )

        @functools.wraps(body)
        def op(plain: bool, *arguments: Any) -> Any:
            if plain:
                return autograd.eager(*arguments)
            if not torch.compiler.is_compiling():
                refuse_transforms(name, tree_iter(arguments), lists="Tensor[]" in schema)
            return registered(*arguments)

        op.register_autograd = autograd.register  # type: ignore[attr-defined]
        return cast(KernelOp[Result], op)

    return decorate


def _dispatched(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return the body in the form that the dispatcher requires.

    A zero tensor arrives as a single expanded 0 and is made contiguous. A result that is an argument is cloned.
    """
    with_results = _without_none(body)

    def with_memory(x: Tensor) -> Tensor:
        return x.contiguous() if 0 in x.stride() else x

    def run(*arguments: Any) -> Any:
        arguments = tree_map_only(Tensor, with_memory, arguments)
        given = {id(x) for x in tree_iter(arguments)}
        return tree_map_only(Tensor, lambda x: x.clone() if id(x) in given else x, with_results(*arguments))

    return run


def _without_none(body: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        results = body(*arguments)
        if not isinstance(results, tuple):
            return results
        return tuple(x if x is not None else results[0].new_empty(0, dtype=torch.float32) for x in results)

    return run


class _Autograd:
    """The gradient of one kernel op, both for torch.library and as an autograd.Function for eager mode."""

    def __init__(self, schema: Any, body: Callable[..., Any]) -> None:
        self.name, self.body, self.eager = schema.name.removeprefix("reca::"), body, body
        self.arguments = [argument.name for argument in schema.arguments]
        self.lists = [str(argument.type) == "List[Tensor]" for argument in schema.arguments]
        self.of: list[int] = []

    def register(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any], of: Sequence[str]) -> None:
        """Define the op's first derivative with respect to the arguments named in `of`.

        Args:
            backward: `(ctx, *grads)` returns a gradient or None per name in `of`; a list of them for a list of tensors.
            setup_context: `(ctx, inputs, output)` saves what backward needs and marks non-differentiable outputs.
            of: The arguments that have a gradient.
        """
        self.user_backward, self.user_setup = once_differentiable(self.name)(backward), setup_context
        self.of = [self.arguments.index(name) for name in of]
        self.eager = self._eager()

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.list_lengths = [len(x) if listed else None for x, listed in zip(inputs, self.lists, strict=True)]
        if self.of:
            ctx.set_materialize_grads(False)
            self.user_setup(ctx, inputs, output)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not self.of:
            raise RuntimeError(_no_derivative(self.name))
        gradients: list[Any] = [None if n is None else [None] * n for n in ctx.list_lengths]
        for place, gradient in zip(self.of, self.user_backward(ctx, *grads), strict=True):
            gradients[place] = gradient
        return tuple(gradients)

    def _eager(self) -> Callable[..., Any]:
        body, setup_context, backward, of = self.body, self.user_setup, self.user_backward, self.of
        listed = any(self.lists[place] for place in of)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, arguments: tuple[Any, ...], *_: Tensor | None) -> Any:
                output = body(*arguments)
                ctx.set_materialize_grads(False)
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
                gradients = backward(ctx, *grads)
                return None, *(_spread(gradients) if listed else gradients)

        # Skips the torch.func handling of Function.apply, which takes 2 microseconds; under transforms no tensor is
        # plain, so this path is not reached.
        apply: Callable[..., Any] = super(torch.autograd.Function, Function).apply

        def eager(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                tensors = [arguments[place] for place in of]
                if listed:
                    tensors = _spread(tensors)
                for tensor in tensors:
                    if tensor is not None and tensor.requires_grad:
                        return apply(arguments, *tensors)
            return body(*arguments)

        return eager


def _spread(nested: Iterable[Any]) -> list[Any]:
    return [x for part in nested for x in (part if isinstance(part, list | tuple) else (part,))]


# ---- second derivative ----


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a backward(ctx, *grads) so that differentiating its gradients raises RuntimeError.

    Under torch's decorator of the same name, `torch.autograd.grad(..., allow_unused=True)` does not raise. There is no
    overhead unless create_graph is set.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            ctx = _ReadOnce(ctx)
            sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            return tree_map_only(Tensor, lambda gradient: _Once.apply(op, gradient, *sources), gradients)

        return once

    return decorate


class _ReadOnce:
    """A ctx whose saved tensors are unpacked only once, as activation checkpointing requires."""

    def __init__(self, ctx: Any) -> None:
        self.__dict__.update(ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)


class _Once(torch.autograd.Function):
    """Identity on a gradient that depends on its sources, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(_no_derivative(ctx.op))


def _no_derivative(op: str) -> str:
    return (
        f"{op.removesuffix('_backward')} has no second derivative: its gradient comes from a kernel. "
        "Use backend='reference' where a gradient is differentiated again"
    )
