"""One CUDA device: a stream that computes, one that copies results, events, graphs, pinned memory.

The host waits for the device at events only. Uploads run in the stream of the computation, whose
order they need; downloads in one of their own, so that the next step does not wait for them.
"""

import atexit
import contextlib
from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from minisgl.device.protocol import Cut, Graph, T
from minisgl.log import get_logger

log = get_logger(__name__)


class CudaEvent:
    """A timing event on one of the device's streams."""

    __slots__ = ("_event", "_failure")

    def __init__(self, stream: Any, failure: BaseException | None) -> None:
        self._failure = failure
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()
        if self._failure is not None:
            raise RuntimeError(f"the step failed: {self._failure!r}") from self._failure

    def seconds_since(self, earlier: "CudaEvent") -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1e3

    def hold(self, stream: Any) -> None:
        """Make `stream`, not the host, wait for the event."""
        stream.wait_event(self._event)


@dataclass(frozen=True)
class CudaPieces:
    """Graphs, and the calls between them."""

    graphs: list[Any] = field(default_factory=list)
    calls: list[Callable[..., object]] = field(default_factory=list)

    def replay(self, *args: object) -> None:
        first, *others = self.graphs
        first.replay()
        for call, graph in zip(self.calls, others, strict=True):
            call(*args)
            graph.replay()


class CudaDevice:
    """One CUDA device. One thread uses it."""

    captures = True
    num_recordings = 0  # what is captured is so before serving

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self.stream: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._copies: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._graph_pool = torch.cuda.graph_pool_handle()
        self._failure: BaseException | None = None
        self._closed = False
        atexit.register(self.close)

    def row_multiple(self, dtype: torch.dtype) -> int:
        return 1

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
            if not isinstance(failure, Exception):
                raise  # an interrupt is the caller's; the step it has cut off is nobody's

    def run(self, function: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise RuntimeError("the device is closed")
        with torch.cuda.stream(self.stream), torch.inference_mode():
            return function(*args)

    def record(self) -> CudaEvent:
        return CudaEvent(self.stream, self._failure)

    def landed(self) -> CudaEvent:
        self.record().hold(self._copies)
        return CudaEvent(self._copies, self._failure)

    def await_downloads(self) -> None:
        self.stream.wait_stream(self._copies)

    def upload(self, array: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        pinned = _pinned(torch.from_numpy(array))
        np.copyto(pinned.numpy(), array)
        if out is None:
            out = torch.empty(pinned.shape, dtype=pinned.dtype, device=self.torch_device)
        out[: len(array)].copy_(pinned, non_blocking=True)
        return out

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = _pinned(tensor)
        self.record().hold(self._copies)
        with torch.cuda.stream(self._copies):
            pinned.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copies)
        return pinned

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def commit_soon(self, parts: Sequence[torch.Tensor]) -> None:
        """All memory of a GPU is there."""

    def begin_step(self, kind: Hashable) -> None:
        """A GPU is used as a whole."""

    def capture(self, function: Callable[[], object]) -> Graph:
        return self.capture_pieces(lambda _: function()).graphs[0]  # type: ignore[no-any-return]

    def capture_pieces(self, function: Callable[[Cut], object]) -> CudaPieces:
        function(lambda call: None)  # compiles kernels and fills the allocator's cache
        self.stream.synchronize()
        pieces = CudaPieces()

        def begin() -> None:
            graph: Any = torch.cuda.CUDAGraph()
            # Not `torch.cuda.graph`, which empties the allocator's cache at every capture.
            graph.capture_begin(pool=self._graph_pool, capture_error_mode="thread_local")
            pieces.graphs.append(graph)

        def cut(call: Callable[..., object]) -> None:
            pieces.graphs[-1].capture_end()
            pieces.calls.append(partial(copy_context().run, call))
            begin()

        begin()
        try:
            function(cut)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # "capture failed": the reason is raised below
                pieces.graphs[-1].capture_end()
            raise
        pieces.graphs[-1].capture_end()
        return pieces

    def free_memory(self) -> int:
        torch.cuda.empty_cache()  # what torch keeps for later is free
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            try:
                self.stream.synchronize()
                self._copies.synchronize()
            except (
                RuntimeError
            ) as error:  # of work whose event has raised it already, or that nobody waits for
                log.warning("%s had failed when it was closed: %s", self.torch_device, error)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Page-locked host memory for a tensor's content. torch gives it out again once its reader and
    the copies with it are done, so little is locked anew: that stops the device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
