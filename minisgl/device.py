"""One protocol for where work runs: streams, events, host copies, graphs, memory. CUDA and CPU.

A device has one in-order stream. `submit` enqueues a function on it and returns before the work is
done: on CUDA the function runs at once and enqueues kernels, on CPU it runs later on the one worker
thread that is the stream. All torch work of an engine happens inside submitted functions, so that
both devices see the same order. A function that raises poisons the stream: later ones are skipped,
and every later event raises the failure when waited for.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch

T = TypeVar("T")
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Memory:
    """Bytes. `used` is this process's share: allocated by torch on CUDA, resident set on CPU."""

    free: int
    total: int
    used: int


class Event(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Block the host until the stream has passed it. RuntimeError when the stream failed."""

    def query(self) -> bool:
        """Whether the stream has passed it."""

    def seconds_since(self, earlier: Self) -> float:
        """Device time between two events that have passed."""


class Graph(Protocol):
    """Work that was captured once and is replayed on the same static buffers."""

    def replay(self) -> None: ...


class Device(Protocol):
    """`submit`, `run`, `record`, `memory` and `close` may be called anywhere, the other methods
    inside the stream only."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def name(self) -> str:
        """What a person would call it."""

    def submit(self, function: Callable[..., object], *args: object) -> None:
        """Enqueue `function(*args)`. RuntimeError after `close`."""

    def run(self, function: Callable[..., T], *args: object) -> T:
        """Enqueue, wait, and return the result or raise what it raised (which poisons nothing)."""

    def record(self) -> Event:
        """An event at the stream's present end; inside the stream, at the work under way."""

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """A device tensor with the array's content; on CPU it shares the array's memory."""

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor, valid once an event recorded after this call has passed."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor; on CPU its pages are committed at first touch."""

    def capture(self, function: Callable[[], object]) -> Graph:
        """A graph of what `function` does to static buffers; on CPU the call itself."""

    def memory(self) -> Memory: ...

    def close(self) -> None:
        """Let the stream finish and stop it. Idempotent."""


def pick_device(name: str) -> Device:
    """The device called "cpu", "cuda", "cuda:N" or "auto" (cuda when there is one).

    ValueError for another name, RuntimeError when CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice()
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device is {name!r} but torch sees no CUDA device")
    return CudaDevice(int(index or 0))


# --- CPU -----------------------------------------------------------------------------------------


class CpuEvent:
    """Set by the stream thread when it gets there."""

    __slots__ = ("_failure", "_gate", "_passed", "_time")

    def __init__(self) -> None:
        self._gate = threading.Lock()  # held until the stream gets there
        self._gate.acquire()
        self._passed = False
        self._failure: BaseException | None = None
        self._time = 0.0

    def wait(self) -> None:
        with self._gate:
            pass
        if self._failure is not None:
            raise RuntimeError(f"the step failed: {self._failure!r}") from self._failure

    def query(self) -> bool:
        return self._passed

    def seconds_since(self, earlier: "CpuEvent") -> float:
        return self._time - earlier._time

    def _pass(self, failure: BaseException | None) -> None:
        self._time = time.perf_counter()
        self._failure = failure
        self._passed = True
        self._gate.release()


@dataclass(frozen=True)
class CallGraph:
    """A graph on a device without graphs: replaying it calls the function."""

    function: Callable[[], object]

    def replay(self) -> None:
        self.function()


class CpuDevice:
    """The CPU as a device: one worker thread is its stream.

    Parallel torch work in a second thread would make OpenMP split the cores between two teams, so
    the thread that plans must call `torch.set_num_threads(1)` before its first torch op.
    `num_threads` is the stream's own share; by default every physical core the process may use.
    """

    torch_device = torch.device("cpu")

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or default_num_threads()
        self._tasks: queue.SimpleQueue[tuple[Callable[..., object], tuple[object, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._failure: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="minisgl-stream", daemon=True)
        self._sized = threading.Event()
        self._thread.start()
        self._sized.wait()

    @property
    def name(self) -> str:
        cores = "core" if self.num_threads == 1 else "cores"
        return f"CPU ({self.num_threads} {cores})"

    def _work(self) -> None:
        torch.set_num_threads(self.num_threads)
        torch.get_num_threads()  # torch sizes a thread's team at its first use, by the last setting
        self._sized.set()
        with torch.inference_mode():
            while (task := self._tasks.get()) is not None:
                function, args = task
                if isinstance(function, _Always):
                    function.call(*args)
                elif self._failure is None:
                    try:
                        function(*args)
                    except BaseException as failure:  # reported by every later event
                        self._failure = failure
                del task, function, args  # a tensor must not outlive its step here

    def submit(self, function: Callable[..., object], *args: object) -> None:
        if self._closed:
            raise RuntimeError("the device is closed")
        self._tasks.put((function, args))

    def run(self, function: Callable[..., T], *args: object) -> T:
        if threading.current_thread() is self._thread:
            return function(*args)
        result: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                result.put((function(*args), None))
            except BaseException as failure:
                result.put((None, failure))

        self.submit(_Always(call))
        value, failure = result.get()
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def record(self) -> CpuEvent:
        event = CpuEvent()
        if threading.current_thread() is self._thread:
            event._pass(self._failure)
        else:
            self.submit(_Always(lambda: event._pass(self._failure)))
        return event

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # numpy's zeros are calloc's: untouched pages cost nothing, torch's are written.
        size = math.prod(shape) * dtype.itemsize
        raw = np.zeros(size + CACHE_LINE, np.uint8)
        start = -raw.ctypes.data % CACHE_LINE
        return torch.from_numpy(raw[start : start + size]).view(dtype).view(tuple(shape))

    def capture(self, function: Callable[[], object]) -> CallGraph:
        return CallGraph(function)

    def memory(self) -> Memory:
        meminfo = _read_kilobytes("/proc/meminfo")
        page = os.sysconf("SC_PAGE_SIZE")
        total = meminfo.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * page)
        free = meminfo.get("MemAvailable", total // 2)
        used = _read_kilobytes("/proc/self/status").get("VmRSS", 0)
        limit = _read_cgroup("memory.max")
        if limit is not None and limit < total:
            total, free = limit, min(free, limit - (_read_cgroup("memory.current") or 0))
        return Memory(free=free, total=total, used=used)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._tasks.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


@dataclass(frozen=True)
class _Always:
    """Runs even on a poisoned stream: events, and calls that report their own failure."""

    call: Callable[[], object]

    def __call__(self) -> None:
        self.call()


def default_num_threads() -> int:
    """OMP_NUM_THREADS if set, else the physical cores this process may use, within its quota."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    if stated.isdigit() and int(stated) > 0:
        return int(stated)
    cpus = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return len(cores) if quota == "max" else max(1, min(len(cores), int(quota) // int(period)))
    except (OSError, ValueError):
        return len(cores)


def _read_kilobytes(path: str) -> dict[str, int]:
    """The "Name: N kB" lines of a /proc file, in bytes; empty where there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def _read_cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


# --- CUDA ----------------------------------------------------------------------------------------


class CudaEvent:
    """A timing event on the device's stream."""

    __slots__ = ("_device", "_event", "_failure")

    def __init__(self, device: "CudaDevice") -> None:
        self._failure = device._failure
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(device.stream)

    def wait(self) -> None:
        self._event.synchronize()
        if self._failure is not None:
            raise RuntimeError(f"the step failed: {self._failure!r}") from self._failure

    def query(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, earlier: "CudaEvent") -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaDevice:
    """One CUDA device and its compute stream. The host never waits for it but at events."""

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self.stream: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._graph_pool = torch.cuda.graph_pool_handle()
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

    def submit(self, function: Callable[..., object], *args: object) -> None:
        if self._closed:
            raise RuntimeError("the device is closed")
        if self._failure is not None:
            return
        try:
            self.run(function, *args)
        except BaseException as failure:  # reported by every later event, as on CPU
            self._failure = failure

    def run(self, function: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise RuntimeError("the device is closed")
        with torch.cuda.stream(self.stream), torch.inference_mode():
            return function(*args)

    def record(self) -> CudaEvent:
        return CudaEvent(self)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        # The caching host allocator reuses a pinned block only after the copy from it has passed.
        pinned = torch.from_numpy(array).pin_memory()
        return pinned.to(self.torch_device, non_blocking=True)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def capture(self, function: Callable[[], object]) -> Graph:
        function()  # compiles kernels and fills the allocator's cache
        self.stream.synchronize()
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool, stream=self.stream):
            function()
        return graph  # type: ignore[no-any-return]

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return Memory(free=free, total=total, used=torch.cuda.memory_allocated(self.torch_device))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.stream.synchronize()
