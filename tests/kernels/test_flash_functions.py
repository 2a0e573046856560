"""Packages of flash-attn as they are found on real machines: whole, of another generation, and broken in every way.

Each is a folder of files made for the test, so the import system is the real one.
"""

import sys
import textwrap

import pytest
import torch

from reca.commands.doctor import report as doctor
from reca_kernels import AttentionSpan, attention, attention_plan, backend_report
from reca_kernels.attention import flash_functions, implementations
from reca_kernels.attention.op import choose

KEYS = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False"
WORKS = f"def flash_attn_varlen_func({KEYS}, deterministic=False): return q * {{}}"
TOO_OLD = f"def flash_attn_varlen_func({KEYS}): return q"
UNDEFINED = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab')"
GPU = torch.device("cuda", 0)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(files): put packages in front of sys.path; capability: what the GPU is said to have."""

    def put(files, capability=(9, 0)):
        for name, code in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(code))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Fake")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        forget()

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
            monkeypatch.delitem(sys.modules, name)
        for kept in (flash_functions.found, choose):
            kept.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    forget()


def chosen(head_dim=64, same=False):
    return choose(GPU, torch.bfloat16, head_dim, same)


def taken(head_dim=64, same=False):
    """What the function multiplies q by: its mark."""
    function = flash_functions.flash_function(chosen(head_dim, same))
    names = sorted(flash_functions.KEYWORDS)
    return int(function(torch.ones(()), 0, 0, **dict.fromkeys(names)))


FA2 = {"flash_attn/__init__.py": WORKS.format(2)}
FA3 = {"flash_attn_interface.py": WORKS.format(3)}
FA4 = {
    "flash_attn/cute/__init__.py": "from .interface import flash_attn_varlen_func",
    "flash_attn/cute/interface.py": WORKS.format(4),
}  # its wheel has no flash_attn/__init__.py


@pytest.mark.parametrize(
    "files,capability,mark",
    [
        (FA2, (8, 0), 2),
        (FA2, (9, 0), 2),
        (FA2 | FA3, (9, 0), 3),
        (FA2 | FA3, (8, 0), 2),  # FlashAttention 3 runs on Hopper only
        (FA4, (9, 0), 4),
        (FA4, (10, 0), 4),
        (FA2 | FA4, (9, 0), 4),
        (FA2 | FA4, (8, 0), 2),  # FlashAttention 4 has no backward there
        (FA3 | FA4, (9, 0), 4),
        (FA2 | FA3 | FA4, (10, 0), 4),
    ],
)
def test_the_function_is_found_wherever_it_is(install, files, capability, mark):
    install(files, capability)
    assert chosen() == f"fa{mark}" and taken() == mark
    assert f"attention on cuda: fa{mark}, default order, nothing measured on this device" in backend_report()
    assert "reinstall or remove it" not in backend_report()


@pytest.mark.parametrize(
    "files,told",
    [
        (
            {"flash_attn/__init__.py": UNDEFINED},
            "importing flash_attn fails with ImportError: flash_attn_2_cuda.so: unde",
        ),
        ({"flash_attn/__init__.py": "import a_package_nobody_has"}, "flash_attn needs a_package_nobody_has, which is"),
        ({"flash_attn/__init__.py": "import math; math.tau_two"}, "importing flash_attn fails with AttributeError"),
        ({"flash_attn/__init__.py": "raise OSError('libcudart.so.11.0')"}, "fails with OSError: libcudart.so.11.0"),
        ({"flash_attn/__init__.py": "__version__ = '2.8'"}, "flash_attn has no flash_attn_varlen_func"),
        ({"flash_attn/__init__.py": "flash_attn_varlen_func = None"}, "flash_attn has no flash_attn_varlen_func"),
        ({"flash_attn/__init__.py": TOO_OLD}, "flash_attn_varlen_func of flash_attn has no argument deterministic"),
        ({"flash_attn_interface.py": UNDEFINED}, "importing flash_attn_interface fails with ImportError"),
        ({"flash_attn/cute/__init__.py": "import cutlass_nobody_has"}, "flash_attn.cute needs cutlass_nobody_has"),
        ({"flash_attn/__init__.py": "raise RuntimeError"}, "importing flash_attn fails with RuntimeError"),
    ],
)
def test_a_broken_one_is_told_of_and_never_taken(install, files, told):
    install(files)
    assert chosen() in ("varlen", "sdpa")
    impl = {name.split("/")[0].removesuffix(".py"): name for name in files}
    impl = "fa4" if "cute" in next(iter(files)) else "fa3" if "flash_attn_interface" in impl else "fa2"
    assert told in implementations.unusable(impl, GPU, torch.bfloat16, 64)
    assert told in backend_report() and told in doctor() and "reinstall or remove it" in doctor()
    plan = attention_plan([[AttentionSpan(3)]])
    q = torch.zeros(3, 1, 8)
    with pytest.raises(RuntimeError, match=f"impl '{impl}' was asked for, but"):
        attention(q, q, q, plan, impl=impl)
    install(FA3 if impl != "fa3" else FA2)  # another that works is taken all the same
    assert chosen() == ("fa3" if impl != "fa3" else "fa2") and told in backend_report()


def test_a_broken_one_is_told_of_without_a_gpu(install, monkeypatch):
    install({"flash_attn/__init__.py": UNDEFINED})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "undefined symbol" in backend_report() and "undefined symbol" in doctor()


def test_an_empty_folder_is_no_package(install):
    """What is left of flash_attn when only another part of it was installed."""
    install({"flash_attn/ops/triton/layer_norm.py": ""})
    assert chosen() in ("varlen", "sdpa") and "reinstall or remove it" not in backend_report()
    reason = implementations.unusable("fa2", GPU, torch.bfloat16, 64)
    assert reason == "FlashAttention 2 (flash_attn) is not installed"


def test_files_of_4_inside_2_are_no_fault(install):
    install(FA2 | {"flash_attn/cute/__init__.py": "import cutlass_nobody_has"})
    assert chosen() == "fa2" and taken() == 2 and "reinstall or remove it" not in backend_report()


@pytest.mark.parametrize(
    "capability,head_dim,same,fits",
    [
        ((8, 0), 64, False, False),
        ((9, 0), 256, True, True),
        ((10, 0), 128, True, True),
        ((10, 0), 192, False, False),
        ((10, 0), 256, False, True),
        ((12, 0), 128, False, True),
        ((12, 0), 128, True, False),
        ((12, 0), 256, False, False),
    ],
)
def test_what_flash_attention_4_has_kernels_for(install, capability, head_dim, same, fits):
    install(FA4, capability)
    assert (implementations.unusable("fa4", GPU, torch.bfloat16, head_dim, same) is None) == fits
    install(FA2, capability)  # where it does not fit, 2 does
    assert chosen(head_dim, same) == ("fa4" if fits else "fa2")


@pytest.mark.parametrize(
    "head_dim,same,fits", [(192, True, True), (200, True, False), (256, True, False), (256, False, True)]
)
def test_what_flash_attention_3_has_kernels_for(install, head_dim, same, fits):
    install(FA3 | FA2)  # its backward pass raises "Deterministic backward not supported for hdim 256"
    assert (implementations.unusable("fa3", GPU, torch.bfloat16, head_dim, same) is None) == fits
    assert chosen(head_dim, same) == ("fa3" if fits else "fa2")


def test_functions_that_hide_their_parameters_are_taken(install):
    install({"flash_attn/__init__.py": "def flash_attn_varlen_func(*a, **b): return a[0] * 7"})
    assert chosen() == "fa2" and taken() == 7
