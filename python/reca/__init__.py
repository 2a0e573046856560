"""Reconstruction alignment (RECA) of unified multimodal models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("reca")  # pyproject.toml states it
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+source"
