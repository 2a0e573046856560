"""Stands for torch.cuda where there is no GPU: a clock that only `work` moves, events, graphs, memory counters."""

from contextlib import contextmanager
from types import SimpleNamespace


class FakeCuda:
    """`work(ms)` is what a kernel would be. While a graph is captured it takes no time but becomes the graph's.

    latency: milliseconds that the host takes for a launch, during which a device without work waits.
    """

    def __init__(self, l2=1 << 20, latency=0.0):
        self.clock, self.host, self.capturing, self.sync_mode, self.l2 = 0.0, 0.0, None, 0, l2
        self.latency = latency
        self.allocated = self.peak = 0

    def work(self, ms):
        if self.capturing is not None:
            self.capturing.ms += ms
        else:
            self.host += self.latency
            self.clock = max(self.clock, self.host) + ms

    def wait(self):
        """What .item() does."""
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nwith a second line")

    def allocate(self, n):
        self.allocated += n
        self.peak = max(self.peak, self.allocated)

    def is_available(self):
        return True

    def get_device_name(self):
        return "NVIDIA Fake 80GB"

    def current_device(self):
        return 0

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=self.l2)

    def synchronize(self):
        self.host = max(self.host, self.clock)

    def empty_cache(self):
        pass

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def get_sync_debug_mode(self):
        return self.sync_mode

    def set_sync_debug_mode(self, mode):
        self.sync_mode = mode

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.clock, self.host))
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    @contextmanager
    def stream(self, stream):
        yield

    def CUDAGraph(self):
        graph = SimpleNamespace(ms=0.0, pool=lambda: "pool")
        graph.replay = lambda: self.work(graph.ms)
        return graph

    @contextmanager
    def graph(self, graph, stream, pool=None):
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
