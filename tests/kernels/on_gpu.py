"""Calls on a GPU as graphs and streams make them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


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
