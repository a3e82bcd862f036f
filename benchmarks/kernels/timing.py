"""Times of single calls with a cold cache, of calls in a graph, and the device's own ceilings.

Both clocks are read by the same code: CUDA's events on a GPU, the host's clock on a CPU, where a
call is over when it returns.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# Several times the last-level cache. It is read, not written: lines that a flush has written would
# be written back while the call is timed.
FLUSH_BYTES = {"cuda": 512 * 2**20, "cpu": 128 * 2**20}
# What a GPU waits for before the flush, so that it is still busy when a call of several kernels has
# been launched, and no launch is timed: half a millisecond, where that takes a fifth of one.
HOLD_CYCLES = 1_000_000
WARMUPS = 3
LONG = 0.2  # seconds: fewer repeats, but three, where they would take more together
GRAPH_CALLS = 20  # in one graph

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: copying (bytes read plus written) and a large matrix product."""

    bytes_per_second: float
    flops_per_second: float
    empty_seconds: float = 0.0  # what is measured when nothing is called


class Event(Protocol):
    """A moment in the device's work. `elapsed_time` of a later one is in milliseconds."""

    def record(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...
    def query(self) -> bool: ...  # whether the device has come to it


class HostEvent:
    """A moment of the host's clock."""

    moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.moment - self.moment)

    def query(self) -> bool:
        return False  # a CPU launches nothing


class HostClock:
    """A CPU's, whose calls are over when they return. Its graph of a call is the call itself."""

    def hold(self) -> None:
        """Keeps the device busy while what follows is launched."""

    def event(self) -> Event:
        return HostEvent()

    def wait(self) -> None:
        """Until everything that was called has been done."""

    def graph(self, call: Call) -> Call:
        """What does the call again, with nothing left for the host to do in between."""
        return call


class CudaClock(HostClock):
    """A GPU's: events in the stream, graphs captured."""

    def hold(self) -> None:
        torch.cuda._sleep(HOLD_CYCLES)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def graph(self, call: Call) -> Call:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        # A capture that fails leaves its stream current; the outer context does not.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            call()
        return graph.replay


class Timer:
    """Medians over at most `repeats` calls on one device."""

    def __init__(self, device: torch.device, repeats: int, *, small: bool = False) -> None:
        self.device, self.repeats = device, repeats
        self.launch_seen = 0.0  # share of the last calls that began before they were all launched
        self.clock = CudaClock() if device.type == "cuda" else HostClock()
        self._graph_calls = 2 if small else GRAPH_CALLS
        size = 2**20 if small else FLUSH_BYTES[device.type]
        self._flush = torch.zeros(size // 4, device=device)

    def seconds(self, call: Call) -> float:
        """Median time of `call` when its data is in no cache."""

        def flush() -> None:
            self.clock.hold()
            self._flush.amax()

        return self._median(call, flush)

    def graph_seconds(self, call: Call) -> float:
        """Median time of `call` as one of many in a graph, its data in the caches: what a short
        kernel costs within a captured step, where a launch by itself would hide it."""

        def calls() -> None:
            for _ in range(self._graph_calls):
                call()

        call()  # loads the kernel, which a capture should not have to do
        self.clock.wait()
        return self._median(self.clock.graph(calls), lambda: None) / self._graph_calls

    def _median(self, call: Call, before: Call) -> float:
        for _ in range(min(WARMUPS, self.repeats)):
            before()
            call()
        self.clock.wait()
        start = time.perf_counter()
        call()
        self.clock.wait()
        once = time.perf_counter() - start
        repeats = min(self.repeats, max(3, int(LONG / max(once, 1e-9))))
        events = [(self.clock.event(), self.clock.event()) for _ in range(repeats)]
        seen = 0
        for begin, end in events:
            before()
            begin.record()
            call()
            end.record()
            seen += begin.query()
        self.launch_seen = seen / repeats
        self.clock.wait()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def measure_ceilings(timer: Timer, dtype: torch.dtype, *, small: bool) -> Ceilings:
    """The copy rate of a buffer that fits no cache, and the rate of a square product in `dtype`."""
    device, on_gpu = timer.device, timer.device.type == "cuda"
    num_bytes = 2**22 if small else 2**32 if on_gpu else 2**28
    source = torch.ones(num_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = timer.seconds(lambda: target.copy_(source))
    size = 128 if small else 8192 if on_gpu else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = timer.seconds(lambda: a @ b)
    empty = timer.seconds(lambda: None)
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product, empty)
