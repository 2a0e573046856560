"""Whether parts of a model are trained, asked in every pass."""

from torch import nn


def any_trained(*modules: nn.Module, skipped: str | None = None) -> bool:
    """Tell whether a parameter of these modules requires a gradient. skipped: part of the names of modules to skip.

    `parameters()` also makes the name of each one, which takes several times as long.
    """
    queue = list(modules)
    for module in queue:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
        for name, child in module._modules.items():
            if child is not None and (skipped is None or skipped not in name):
                queue.append(child)
    return False
