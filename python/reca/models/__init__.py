"""The unified multimodal models. Each folder has the same files:

    config    recipe keys
    model     the Adapter: what the driver asks
    prompt    sequences of tokens
    modules   the network
    loss      preparation on the host, and the losses
    sampling  generate, reconstruct, edit, answer
    weights   load and export published files

`common` has what two models share or more.
"""

import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from reca.options.fields import RecipeError, format_value
from reca.options.names import hint

UMMS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/config.py")))
OUTSIDE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")  # package.module


def umm_package(name: str) -> ModuleType:
    """Import the package of a model: a subfolder of this package, or any `package.module` on the Python path.

    Returns:
        A module with `Config`, a dataclass of recipe keys, and `Adapter`.

    Raises:
        RecipeError: The package does not exist, it lacks `Config` or `Adapter`, or `Adapter` is incomplete.
    """
    if name in UMMS:
        return import_module(f"reca.models.{name}")
    if not OUTSIDE.fullmatch(name):
        raise RecipeError(
            f"umm={format_value(name)} is not one of {', '.join(map(repr, UMMS))}; a model of your own is named "
            f"package.module{hint(name, UMMS)}"
        )
    try:
        package = import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a missing dependency of the package
        raise RecipeError(
            f"umm={name} cannot be imported: there is no module {error.name}; install it, or put its folder on "
            "PYTHONPATH"
        ) from error
    if not isinstance(getattr(package, "Adapter", None), type) or not is_dataclass(getattr(package, "Config", None)):
        raise RecipeError(f"umm={name} must define Config, a dataclass, and Adapter (see reca/models/base.py)")
    base = import_module("reca.models.base").Adapter  # imports torch, which listing the models does not need
    if not issubclass(package.Adapter, base):
        raise RecipeError(f"umm={name}: Adapter must inherit from reca.models.base.Adapter")
    if missing := [key for key in base.__annotations__ if not hasattr(package.Adapter, key)]:
        raise RecipeError(f"umm={name}: Adapter lacks {', '.join(missing)} (see reca/models/base.py)")
    return package
