"""python -m benchmarks.sdp_kernels [--device cpu|cuda]: profile which of torch's attention kernels `sdpa` uses.

On Hopper torch may prefer cuDNN, which makes a plan for every new shape; TORCH_CUDNN_SDPA_DEPRIORITIZED=1 puts it last.
Prints one line per layout: the kernels that ran, the number of calls, and their time in the forward pass.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.attention import cases
from benchmarks.devices import Device, opened
from benchmarks.rows import BY_SIZE, OURS

# Torch operators and the names of their kernels. `math` is a softmax between two matmuls; it materialises all scores.
KERNELS = {
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash (CPU)",
    "_scaled_dot_product_efficient_attention": "mem-efficient",
    "_scaled_dot_product_attention_math": "math",
}


class Ran(NamedTuple):
    kernel: str
    calls: int
    ms: float  # time on the device


def kernels_of(call: Callable[[], object], device: Device) -> list[Ran]:
    """Return the attention kernels that a call uses, longest time first."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as record:
        call()
    found = [
        Ran(kernel, event.count, (event.device_time_total if gpu else event.cpu_time_total) / 1e3)
        for event in record.key_averages()
        if (kernel := KERNELS.get(event.key.removeprefix("aten::")))
    ]
    return sorted(found, key=lambda ran: -ran.ms)


def report(device: Device) -> list[str]:
    """Return one line per layout."""
    lines = []
    for case in cases(device):
        if case.shape.startswith(BY_SIZE):
            continue
        x, run = case.inputs(0), case.providers[f"{OURS}: sdpa"].run
        run(x)  # warm-up: creates plans and workspaces
        ran = kernels_of(lambda: torch.autograd.grad(run(x)[0], (x.q, x.k, x.v), x.grad), device)  # noqa: B023
        kernels = ", ".join(f"{one.kernel} x {one.calls} ({one.ms:.3f} ms forward)" for one in ran) or "no known kernel"
        lines.append(f"sdpa on {case.shape}, {case.dtype}: {kernels}")
        device.free()
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdp_kernels", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    print("\n".join(report(opened(parser, parser.parse_args(arguments).device))))


if __name__ == "__main__":
    main(sys.argv[1:])
