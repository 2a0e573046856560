"""Whether Triton's interpreter works here. The one place that knows: asked before triton is imported."""

from importlib import metadata


def problem() -> str | None:
    """Why Triton kernels cannot run in Triton's interpreter; None when they can."""
    try:
        triton, numpy = (_release(metadata.version(name)) for name in ("triton", "numpy"))
    except metadata.PackageNotFoundError as missing:
        return f"{missing.name} is not installed"
    if triton < (3, 7) and numpy >= (2, 5):
        # It takes int() of arrays of one element, which NumPy 2.5 refuses ("only 0-dimensional arrays can be ...").
        return (
            f"the interpreter of Triton {_told(triton)} fails with NumPy {_told(numpy)}: take Triton 3.7 or NumPy 2.4"
        )
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _told(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
