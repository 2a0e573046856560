"""Backend "cuda" on device "cpu" means the emulator of emulated.py."""

import pytest

from reca_kernels import dispatch, native
from tests.kernels import emulated


@pytest.fixture(scope="session")
def emulator():
    return emulated.build(find_races=True)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest):
    """Let the CPU kernels run with one instruction set, which this processor may not have."""
    if native.module is None:
        pytest.skip(str(native.missing))
    best = native.module.current_isa()
    try:
        native.module.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.module.set_isa(best)


@pytest.fixture(autouse=True)
def emulate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = getattr(request.node, "callspec", None)
    if asked is None or (asked.params.get("backend"), asked.params.get("device")) != ("cuda", "cpu"):
        return
    monkeypatch.setattr(native, "module", request.getfixturevalue("emulator"))
    monkeypatch.setattr(native, "launch", lambda tensor: native.Launch(device=0, stream=0, threads=0))
    usable = dispatch.unusable
    monkeypatch.setattr(
        dispatch,
        "unusable",
        lambda op, backend, device, index=None: (
            None if (backend, device) == ("cuda", "cpu") else usable(op, backend, device, index)
        ),
    )
    dispatch._decide.cache_clear()
    request.addfinalizer(dispatch._decide.cache_clear)
