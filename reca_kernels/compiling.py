"""Decorators of torch.compiler that do not import torch._dynamo, which takes longer than this whole package.

Those of torch.compiler import it where they are applied, so `import reca_kernels` would do so in every process.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(function: Function) -> Function:
    """Evaluate the function when a graph is traced and make the result a constant of the graph.

    Sets the attribute that `torch.compiler.assume_constant_result` sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def disable(function: Function) -> Function:
    """Run the function eagerly, also inside a compiled function. torch._dynamo is imported at the first call."""
    return cast(Function, torch._disable_dynamo(function))
