"""The CPU as a device: one worker thread is its stream, and its graphs are tapes."""

import atexit
import ctypes
import math
import mmap
import os
import queue
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minisgl import csrc
from minisgl.device.pace import Pace
from minisgl.device.protocol import Cut, T
from minisgl.device.tape import ALL, Arena, TapeGraph
from minisgl.interrupts import held_back

CACHE_LINE = 64  # bytes
HUGE_PAGE = 2 * 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MADV_POPULATE_WRITE = 23  # of madvise(2)
MMAP_THRESHOLD = 32 * 2**20  # the most that glibc takes
FP32_ROWS = 8  # that matrix products take at once; half of them for the last ones


class CpuEvent:
    """A point in the stream: set by its thread."""

    __slots__ = ("_failure", "_gate", "_passed", "_time")

    def __init__(self) -> None:
        self._gate = threading.Lock()  # held until the stream has passed
        self._gate.acquire()
        self._passed = False
        self._failure: BaseException | None = None
        self._time = 0.0

    def wait(self) -> None:
        if not self._passed:  # an interrupt may have kept the gate: it was open then
            with self._gate:
                pass
        if self._failure is not None:
            raise RuntimeError(f"the step failed: {self._failure!r}") from self._failure

    def seconds_since(self, earlier: "CpuEvent") -> float:
        return self._time - earlier._time

    def _pass(self, failure: BaseException | None) -> None:
        self._failure = failure
        self._time = time.perf_counter()
        self._passed = True
        self._gate.release()


@dataclass(frozen=True)
class CallPieces:
    """Pieces on a device without graphs: a replay calls the function and what it cuts out."""

    function: Callable[[Cut], object]

    def replay(self, *args: object) -> None:
        self.function(lambda call: call(*args))


class CpuDevice:
    """The CPU as a device: one worker thread is its stream.

    Parallel torch work in a second thread would make OpenMP split the cores between two teams, so
    the thread that plans must call `torch.set_num_threads(1)` before its first torch op.
    `num_threads` is the stream's own share; by default every physical core the process may use.
    """

    torch_device = torch.device("cpu")
    captures = False

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or default_num_threads()
        # What to call, and whether even after a failure of the stream.
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], bool] | None]
        self._tasks = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._opening = threading.Lock()  # nothing is put behind the end, where it would never run
        self._arena = Arena()
        self._paces: defaultdict[Hashable, Pace] = defaultdict(Pace)
        self._kind: Hashable = None  # of the step under way
        self._began = 0.0
        self._committer = ThreadPoolExecutor(1, "minisgl-memory", be_patient)  # starts at first use
        # Static buffers that are uploaded to, and as numpy sees them; by the tensor's id.
        self._buffers: dict[int, tuple[torch.Tensor, np.ndarray]] = {}
        self._thread = threading.Thread(target=self._work, name="minisgl-stream", daemon=True)
        self._sized = threading.Event()
        self._thread.start()
        self._sized.wait()
        atexit.register(self.close)  # native code must not return into a Python that is exiting

    def row_multiple(self, dtype: torch.dtype) -> int:
        return FP32_ROWS if dtype == torch.float32 else 1

    @property
    def num_recordings(self) -> int:
        return self._arena.num_tapes

    @property
    def name(self) -> str:
        cores = "core" if self.num_threads == 1 else "cores"
        return f"CPU ({self.num_threads} {cores}, {csrc.level_in_use()})"

    def _work(self) -> None:
        keep_freed_memory()
        torch.set_num_threads(self.num_threads)
        torch.get_num_threads()  # torch sizes a thread's team at its first use, by the last setting
        self._sized.set()
        with torch.inference_mode():
            while (task := self._tasks.get()) is not None:
                call, always = task
                if always or self._failure is None:
                    try:
                        call()
                    except BaseException as failure:  # reported by every later event
                        self._failure = failure
                del task, call  # a tensor must not outlive its step here

    def submit(self, function: Callable[..., object], *args: object) -> None:
        self._put(partial(function, *args), always=False)

    def _put(self, call: Callable[[], object], *, always: bool) -> None:
        with self._opening:
            if self._closed:
                raise RuntimeError("the device is closed")
            self._tasks.put((call, always))

    def run(self, function: Callable[..., T], *args: object) -> T:
        if threading.current_thread() is self._thread:
            return function(*args)
        result: Future[T] = Future()

        def call() -> None:
            try:
                result.set_result(function(*args))
            except BaseException as failure:
                result.set_exception(failure)

        self._put(call, always=True)
        return result.result()

    def record(self) -> CpuEvent:
        event = CpuEvent()
        if threading.current_thread() is self._thread:
            event._pass(self._failure)
        else:
            self._put(lambda: event._pass(self._failure), always=True)
        return event

    def upload(self, array: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            return torch.from_numpy(array)
        if id(out) not in self._buffers:
            self._buffers[id(out)] = out, out.numpy()
        _, buffer = self._buffers[id(out)]
        if len(array) > len(buffer):
            raise RuntimeError(f"{len(array)} values do not fit in a buffer of {len(buffer)}")
        buffer[: len(array)] = array  # by numpy, which keeps Python's lock
        return out

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    landed = record

    def await_downloads(self) -> None:
        """They are copied at once."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return lazy_zeros(shape, dtype)

    def commit_soon(self, parts: Sequence[torch.Tensor]) -> None:
        with suppress(RuntimeError):  # no thread is to be had, or no more: it is a hint
            for part in parts:
                self._committer.submit(commit, part)

    def begin_step(self, kind: Hashable) -> None:
        now = time.perf_counter()
        period = now - self._began if kind is not None and kind == self._kind else None
        self._kind, self._began = kind, now
        on_one = self.num_threads > 1 and kind is not None and self._paces[kind].on_one(period)
        self._arena.threads = 1 if on_one else ALL

    def capture(self, function: Callable[[], object]) -> TapeGraph:
        return TapeGraph(function, self._arena)

    def capture_pieces(self, function: Callable[[Cut], object]) -> CallPieces:
        return CallPieces(function)

    def free_memory(self) -> int:
        return int(min(_available(), left_of_quota(Path("/sys/fs/cgroup"))))

    def close(self) -> None:
        with held_back():
            with self._opening:
                if not self._closed:
                    self._closed = True
                    self._tasks.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join()
                atexit.unregister(self.close)
            self._committer.shutdown(cancel_futures=True)


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, up to the thresholds to which
    glibc raises its own for programs that free as much at once. Else what a prompt of a small model
    takes goes back to the system after each step, and faults of 4 KiB are a tenth of the next."""
    with suppress(OSError, AttributeError):  # of another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD)


def give_back_freed_memory() -> None:
    """Return to the system what the C library keeps of what is free by now."""
    with suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages are committed at first touch; large ones in huge pages, where there are
    such: a fault for every 4 KiB of KV takes a tenth of a prompt's time."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(size + CACHE_LINE, np.uint8)
    else:
        # Private: of shared memory, which is Python's default, most kernels make small pages only.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, size + CACHE_LINE, flags=flags)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(tuple(shape))


def be_patient() -> None:
    """Let this thread run where no other wants the core, on Linux, where it can be asked."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def commit(part: torch.Tensor) -> None:
    """Have the system give a part of `lazy_zeros` its memory now; what it holds stays. A virtual
    machine's may be new to its host too, and then takes longer to come than to fill."""
    end = part.data_ptr() + part.nbytes
    start = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    with suppress(OSError, AttributeError):  # of another C library; an older Linux refuses
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_WRITE)


def default_num_threads(processes: int = 1) -> int:
    """OMP_NUM_THREADS if set, else an equal share, for each of `processes` that work at the same
    time, of the physical cores that this process may use within its quota."""
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
        count = len(cores) if quota == "max" else min(len(cores), int(quota) // int(period))
    except (OSError, ValueError):
        count = len(cores)
    return max(1, count // processes)


def _available() -> int:
    """Bytes that the machine can give without swapping; half of all where it does not say."""
    with suppress(OSError):
        if stated := re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(stated[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def left_of_quota(cgroup: Path) -> float:
    """Bytes until the container's limit; files in the page cache, which a checkpoint that has been
    read fills, count as free, for the kernel drops them. Infinite without a limit."""
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" where there is none
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf
