"""`reca doctor`: report hardware, software and the kernels that will run, and how to get what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

import reca_kernels
from reca import units
from reca_kernels.attention import op as attention


def report() -> str:
    """Return the report as text, one finding per line."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    lines = [
        f"python      {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPUs, "
        f"torch threads {torch.get_num_threads()}",
        f"torch       {torch.__version__}",
        _gpu(),
        "",
        *reca_kernels.backend_report().splitlines(),
        f"attention tried on {device}: {attention.trial(device)}",
        "",
    ]
    lines += [f"{name:<11} {_version(name, what)}" for name, what in _OPTIONAL.items()]
    lines += [f"{'apex':<11} {_apex()}", f"{'disk':<11} {units.size(shutil.disk_usage(Path.cwd()).free)} free here"]
    return "\n".join(lines)


_OPTIONAL = {
    "transformers": "required",
    "diffusers": "required",
    "triton": "comes with torch on GPU machines",
    "nvidia-dali": "pip install 'reca[dali]': decoding on the GPU; Pillow decodes without it",
    "flash-attn": "pip install 'reca[flash]': FlashAttention 2; optional, torch's flash kernels are used without it",
    "flash-attn-4": "pip install --pre flash-attn-4: optional, for Hopper and Blackwell",
    "tensorboard": "pip install 'reca[log]': log.jsonl is written without it",
    "wandb": "pip install 'reca[log]': for log.wandb; log.jsonl is written without it",
}


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "GPU         none visible: C++ kernels run on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"GPU         {len(names)} x {names[0]}, CUDA {torch.version.cuda}"


def _version(name: str, advice: str) -> str:
    for candidate in importlib.metadata.distributions():
        found = (candidate.name or "").lower()
        if found == name or found.startswith(f"{name}-cuda"):
            return candidate.version
    return f"not installed ({advice})"


def _apex() -> str:
    if importlib.util.find_spec("apex") is None:
        return "not installed (optional; build NVIDIA's from source, PyPI's package of that name is unrelated)"
    from reca.optim import apex_adam  # here, because it needs dependencies that the kernels alone do not

    try:
        apex_adam()
    except ValueError as error:
        return f"cannot be used: {error}"
    return "NVIDIA apex with CUDA extensions"
