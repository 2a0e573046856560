"""Reconstruction alignment (RECA) of unified multimodal models.

    import reca

    reca.train("show_o_512", ["data.images=/data/images", "data.conversations=/data/llava.json"])
    model = reca.load("runs/show_o_512")
    images = model.generate(["a yellow broccoli"], seeds=[0])
    results = reca.evaluate("toy", "runs/show_o_tiny", against="base")

Importing this package loads no torch; the first call of `load`, `train` or `evaluate` does.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reca.api import evaluate, load, train

__all__ = ["__version__", "evaluate", "load", "train"]

try:
    __version__ = version("reca")  # pyproject.toml states it
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+source"


def __dir__() -> list[str]:
    """List the lazy functions, too, which notebooks complete."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "load", "train"):
        from reca import api

        return getattr(api, name)
    raise AttributeError(f"module 'reca' has no attribute {name!r}; it offers {', '.join(__all__)}")
