"""What a device is: an in-order stream, its events, host copies, graphs and memory.

`submit` enqueues a function on the stream and returns before the work is done: on CUDA the function
runs at once and enqueues kernels, on CPU it runs later on the one worker thread that is the stream.
All torch work of an engine happens inside submitted functions, so that both devices see the same
order. After a function has raised, later ones are skipped, and every later event raises its failure
when it is waited for.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Event(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Block the host until the stream has passed it. RuntimeError when the stream failed."""

    def seconds_since(self, earlier: Self) -> float:
        """Device time between two events that have passed."""


class Graph(Protocol):
    """Work that was captured once and is replayed on the same static buffers."""

    def replay(self, *args: object) -> None:
        """Replay it, and call what was cut out of it with `args` where it was."""


Cut = Callable[[Callable[..., object]], object]


class Device(Protocol):
    """`submit`, `run`, `record`, `landed`, `row_multiple`, `free_memory` and `close` may be called
    anywhere, the other methods inside the stream only."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def captures(self) -> bool:
        """Whether graphs of a few sizes are made ahead; else those of any size at first use."""

    @property
    def num_recordings(self) -> int:
        """Graphs made so far at their first replay, whose steps take longer than others."""

    def row_multiple(self, dtype: torch.dtype) -> int:
        """Matrix products treat a row alike whatever others there are, if their number is half of
        this or a multiple of it; 1 = any number."""

    @property
    def name(self) -> str:
        """For logs and reports."""

    def submit(self, function: Callable[..., object], *args: object) -> None:
        """Enqueue `function(*args)`. RuntimeError after `close`."""

    def run(self, function: Callable[..., T], *args: object) -> T:
        """Enqueue, wait, and return the result or raise what it raised; the stream goes on."""

    def record(self) -> Event:
        """An event at the stream's current end; inside the stream, after the work so far."""

    def upload(self, array: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        """A device tensor with the array's content; or `out`, a static buffer whose first entries
        that becomes.

        Without `out`, on CPU, it shares the array's memory. RuntimeError where `out` is too small.
        """

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, valid once the next `landed` has passed."""

    def landed(self) -> Event:
        """Like `record`, and all downloads so far are on the host."""

    def await_downloads(self) -> None:
        """Make the stream wait for the downloads so far: what they read may be overwritten then."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor; on CPU its pages are committed at first touch."""

    def commit_soon(self, parts: Sequence[torch.Tensor]) -> None:
        """Commit parts of zeroed tensors while there is nothing better to do, on a CPU."""

    def begin_step(self, kind: Hashable) -> None:
        """A step begins, of a kind that takes about the same time whenever it is replayed, or None.
        A CPU chooses by it how many cores the replays until the next step have."""

    def capture(self, function: Callable[[], object]) -> Graph:
        """A graph of what `function` does to static buffers; on CPU made at its first replay."""

    def capture_pieces(self, function: Callable[[Cut], object]) -> Graph:
        """Graphs of what `function` does to static buffers, without the calls that it cuts out.

        `function` is given `cut`, and calls it with what must run again at every replay, between
        the work before and the work after. It runs with the context variables of the capture.
        """

    def free_memory(self) -> int:
        """Bytes that may still be allocated."""

    def close(self) -> None:
        """Let the stream finish and stop it. Idempotent; called when Python exits at the latest."""
