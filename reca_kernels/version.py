"""The version of the installed distribution. pyproject.toml states it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("reca")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+source"
