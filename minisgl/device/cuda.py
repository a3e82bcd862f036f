"""One CUDA device: its compute stream, events and graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from minisgl.device.protocol import Graph, Memory, T


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
