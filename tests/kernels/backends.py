"""Which backends of an op can be tested on this machine, and on which device.

Without a GPU tests/conftest.py sets TRITON_INTERPRET=1 before anything imports triton, and Triton kernels run in its
interpreter on CPU tensors (about 10 ms per program: keep rows few). With a GPU they run there, under the mark `gpu`.
CUDA C++ kernels run on CPU tensors in the emulator of emulated.py (about a microsecond per thread and barrier), with or
without a GPU.
"""

import os

import pytest

from reca_kernels import dispatch, native
from tests import interpreter
from tests.kernels import emulated

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and interpreter.problem() is None


def targets(op: str, *, reference: bool = True, skip: tuple[str, ...] = ()) -> list:
    """pytest parameters (backend, device) for parametrize(("backend", "device"), targets(OP)).

    A backend without the op is left out. One that cannot run here is there and skipped: `pytest -rs` says why.
    """
    no_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))
    why = interpreter.problem() or "a GPU is there to run Triton on"
    no_triton = pytest.mark.skipif(not INTERPRETED, reason=why)
    no_cuda = pytest.mark.skipif(
        native.module is None or not native.module.cuda_archs, reason="the native module was built without CUDA"
    )
    cannot_emulate = str(native.missing) if native.module is None else emulated.missing()
    no_emulator = pytest.mark.skipif(cannot_emulate is not None, reason=str(cannot_emulate))
    gpu = pytest.mark.gpu
    candidates = [
        ("reference", "cpu", []),
        ("cpu", "cpu", [no_native]),
        ("triton", "cpu", [no_triton]),
        ("cuda", "cpu", [no_emulator]),
        ("reference", "cuda", [gpu]),
        ("cuda", "cuda", [gpu, no_cuda]),
        ("triton", "cuda", [gpu]),
    ]
    return [
        pytest.param(backend, device, marks=marks, id=f"{backend}-{device}")
        for backend, device, marks in candidates
        if backend not in skip and (reference if backend == "reference" else dispatch.has_backend(op, backend))
    ]
