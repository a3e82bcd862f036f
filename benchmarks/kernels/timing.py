"""Times of single calls with a cold cache, and the device's own ceilings measured the same way."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

# Several times the last-level cache. Clearing it keeps a GPU busy for longer than it takes to
# launch a call, so that no launch is timed.
FLUSH_BYTES = {"cuda": 512 * 2**20, "cpu": 128 * 2**20}
WARMUPS = 3
LONG = 0.2  # seconds: fewer repeats, but three, where they would take more together


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: copying (bytes read plus written) and a large matrix product."""

    bytes_per_second: float
    flops_per_second: float
    empty_seconds: float = 0.0  # what is measured when nothing is called


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `call` with cold caches: CUDA events on a GPU, the wall clock on a CPU."""
    for _ in range(WARMUPS):
        call()
    flush = _flush_buffer(device)
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    once = time.perf_counter() - start
    repeats = min(repeats, max(3, int(LONG / max(once, 1e-9))))
    if device.type == "cuda":
        return _cuda_seconds(call, flush, repeats)
    times = []
    for _ in range(repeats):
        flush.zero_()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _cuda_seconds(call: Callable[[], object], flush: torch.Tensor, repeats: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> Ceilings:
    """The copy rate of a buffer that fits no cache, and the rate of a square product in `dtype`."""
    on_gpu = device.type == "cuda"
    source = torch.ones((2**32 if on_gpu else 2**28) // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, repeats)
    size = 8192 if on_gpu else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = median_seconds(lambda: a @ b, device, repeats)
    empty = median_seconds(lambda: None, device, repeats)
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product, empty)
