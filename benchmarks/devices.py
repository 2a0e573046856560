"""The differences between CPU and GPU: clock, memory, cache, names. Everything else is common code in runner.py."""

import argparse
import itertools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from reca.hardware.host_memory import FreedMemory

Forward = Callable[[Any], tuple]  # inputs -> results
Backward = Callable[[Any, tuple], tuple]  # inputs, results -> gradients
Times = tuple[float, float]  # milliseconds of the forward and of the backward pass


class Ceilings(NamedTuple):
    """Rates measured on this device in this run: a copy in GB/s, reads plus writes, and matmuls in TFLOP/s by dtype."""

    copy: float
    gemm: dict[str, float]

    def floor_ms(self, bytes_: int, flops: int, dtype: str) -> float:
        """Return the lower bound of the time for this traffic and arithmetic."""
        return max(bytes_ / self.copy / 1e6, flops / self.gemm[dtype] / 1e9 if flops else 0.0)


class Cpu:
    clock = staticmethod(time.perf_counter)
    type, result_file = "cpu", "cpu"
    backends = ("cpu",)
    torch_device = torch.device("cpu")
    graphs = False
    copy_bytes, gemm_side = 1 << 28, 1024

    def __init__(self) -> None:
        self.freed = FreedMemory()

    def keep_freed(self) -> bool:
        """Let calls reuse memory freed by earlier ones: mapping new zeroed pages takes longer than most ops."""
        return self.freed.keep()

    def time(self, forward: Forward, backward: Backward, inputs: Iterator) -> Times:
        x = next(inputs)
        began = self.clock()
        results = forward(x)
        between = self.clock()
        backward(x, results)
        return 1e3 * (between - began), 1e3 * (self.clock() - between)

    def peak_mb(self, call: Callable[[], Any]) -> float:
        """Return the peak of live allocations during a call, above those before it, in 1e6 bytes."""
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = call()
            del result
        live = peak = 0
        for event in record.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        return peak / 1e6

    def cache_bytes(self) -> int:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        return int(size.read_text().strip().removesuffix("K")) << 10 if size.exists() else 32 << 20

    def free(self) -> None:
        self.freed.give_back()

    def facts(self) -> dict:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
        return {"device": name, "driver": ""}


class CpuTime(Cpu):
    """A CPU with the CPU time of this process as its clock, which other processes on the machine affect less.

    For whole training steps, which have larger matmuls.
    """

    clock = staticmethod(time.process_time)
    gemm_side = 2048


class Cuda:
    """A GPU, timed with events on the current stream. `api` is torch.cuda, except in tests."""

    type = "cuda"
    backends = ("cuda", "triton")
    graphs = True
    copy_bytes, gemm_side = 1 << 31, 8192
    most_calls, graph_ms = 32, 0.3  # a graph contains enough calls to run this long

    def __init__(self, api: Any = torch.cuda, target: str = "cuda") -> None:
        if not api.is_available():
            raise RuntimeError(
                f"--device cuda: torch {torch.__version__} finds no CUDA device; use a machine where nvidia-smi shows "
                "one and a torch built with CUDA, or use --device cpu"
            )
        self.api, self.torch_device = api, torch.device(target)
        self.result_file = re.sub(r"\W+", "_", api.get_device_name().lower())

    def _events(self) -> list:
        return [self.api.Event(enable_timing=True) for _ in range(3)]

    def _read(self, events: list, calls: int = 1) -> Times:
        self.api.synchronize()
        began, between, ended = events
        return began.elapsed_time(between) / calls, between.elapsed_time(ended) / calls

    def time(self, forward: Forward, backward: Backward, inputs: Iterator) -> Times:
        """Time a call.

        An untimed call before it keeps the device busy while the timed one is launched.
        """
        x = next(inputs)
        backward(x, forward(x))
        x, events = next(inputs), self._events()
        events[0].record()
        results = forward(x)
        events[1].record()
        backward(x, results)
        events[2].record()
        return self._read(events)

    def captured(
        self, forward: Forward, backward: Backward, sets: Sequence, floor_ms: float
    ) -> Callable[[Forward, Backward, Iterator], Times]:
        """Return a replacement for `time` that replays two CUDA graphs: forward and backward passes over all inputs.

        Raises RuntimeError for a provider that synchronises with the device, which cannot be captured.
        """
        api, calls = self.api, min(self.most_calls, int(self.graph_ms / floor_ms) + 1)
        order = [sets[i % len(sets)] for i in range(max(calls, len(sets)))]
        stream = api.Stream()
        stream.wait_stream(api.current_stream())
        with api.stream(stream), self._waits_are_errors():
            for _ in range(3):
                backward(order[0], forward(order[0]))
        api.current_stream().wait_stream(stream)
        api.synchronize()
        first, second = api.CUDAGraph(), api.CUDAGraph()
        with api.graph(first, stream=stream):
            results = [forward(x) for x in order]
        with api.graph(second, pool=first.pool(), stream=stream):
            # The graphs write to these tensors at every replay.
            kept = [backward(x, r) for x, r in zip(order, results, strict=True)]

        def replay(forward: Forward, backward: Backward, inputs: Iterator, kept=(results, kept)) -> Times:
            events = self._events()
            first.replay()  # not timed, as in `time`
            second.replay()
            events[0].record()
            first.replay()
            events[1].record()
            second.replay()
            events[2].record()
            return self._read(events, len(order))

        replay(forward, backward, iter(sets))
        return replay

    @contextmanager
    def _waits_are_errors(self):
        before = self.api.get_sync_debug_mode()
        self.api.set_sync_debug_mode("error")
        try:
            yield
        finally:
            self.api.set_sync_debug_mode(before)

    def peak_mb(self, call: Callable[[], Any]) -> float:
        """Return the peak of live allocations during a call, above those before it, in 1e6 bytes."""
        call()
        self.api.synchronize()
        self.api.reset_peak_memory_stats()
        before = self.api.memory_allocated()
        call()
        self.api.synchronize()
        return (self.api.max_memory_allocated() - before) / 1e6

    def cache_bytes(self) -> int:
        return self.api.get_device_properties(self.api.current_device()).L2_cache_size

    def free(self) -> None:
        self.api.empty_cache()

    def facts(self) -> dict:
        try:
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip().split("\n")[0]
        except FileNotFoundError:
            driver = ""
        return {"device": self.api.get_device_name(), "driver": driver or "unknown"}  # rows of a CPU have none


Device = Cpu | Cuda


def opened(parser: argparse.ArgumentParser, kind: str, cpu: type[Cpu] = Cpu) -> Device:
    """Open the device that --device names, or end with why there is none."""
    try:
        return cpu() if kind == "cpu" else Cuda()
    except RuntimeError as error:
        parser.error(str(error))


def ceilings(device: Device, dtypes: Sequence[torch.dtype], rounds: int = 9, share: int = 1) -> Ceilings:
    """Measure the rates on random data, then free the memory. Buffers have 1 / share of the device's default size."""
    generator = torch.Generator(device.torch_device).manual_seed(0)

    def median_ms(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(3 + rounds):
            times.append(device.time(lambda _: call(), lambda _, __: None, itertools.repeat(None))[0])
        return statistics.median(times[3:])

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device.torch_device)

    def copied() -> float:
        source = random(device.copy_bytes // share // 4)
        target = torch.empty_like(source)
        return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6

    def multiplied(dtype: torch.dtype) -> float:
        side = device.gemm_side // share
        a, b = (random(side, side).to(dtype) for _ in range(2))
        return 2 * side**3 / median_ms(lambda: a @ b) / 1e9

    found = Ceilings(copied(), {str(dtype).removeprefix("torch."): multiplied(dtype) for dtype in dtypes})
    device.free()
    return found
