"""Other libraries that implement the same ops. If one is not available, its row says why."""

import importlib
from collections.abc import Callable
from types import ModuleType

from benchmarks.devices import Device
from benchmarks.runner import Provider


def rival(
    package: str, module: str, device: Device, make: Callable[[ModuleType], Callable], own_inputs: bool = False
) -> Provider | str:
    """Return a provider that uses `module`, or why it cannot be used. make: module -> function of the inputs.

    All of these libraries run on CUDA devices only.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name and module.split(".")[0] == missing.name.split(".")[0]:
            return f"not installed ({package})"
        return f"not importable: {package} needs {missing.name}"
    except Exception as error:
        return f"not importable: {package}: {type(error).__name__}: {error}"
    if device.type != "cuda":
        return f"runs on CUDA devices only ({package})"
    try:
        return Provider(make(found), own_inputs)
    except AttributeError as error:
        return f"unexpected interface ({package}): {error}"
