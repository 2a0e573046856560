"""Calls on a GPU as graphs and streams make them, and under compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_sanitizer = pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer in PATH")


def capture(run: Callable[[], Any], warm_up: Callable[[], Any] | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run`, and its results, which a replay makes anew. warm_up (None: run) compiles what it launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            (warm_up or run)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def on_streams(runs: Sequence[Callable[[], Any]]) -> list[Any]:
    """The last results of ten rounds, every run on a stream of its own."""
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in runs], []
    for _ in range(10):
        got = []
        for stream, run in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                got.append(run())
    torch.cuda.synchronize()
    return got


def sanitize(tool: str, *arguments: str) -> None:
    """Run Python under a tool of compute-sanitizer, which must find nothing.

    Calls of the CUDA API that fail are no findings: torch and its libraries ask for what may not be there, and a launch
    of ours that fails raises an exception.
    """
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # so that every tensor ends where its memory does
    }
    done = subprocess.run([*command, sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
