"""A GPU without memory: what is asked of it has the right shape and no content.

Steps run on it as on a GPU, but for their kernels. It is how a start finds out which ones to build.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from minisgl.device.protocol import Cut, T


class MetaEvent:
    """A point in a stream in which nothing takes time."""

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: "MetaEvent") -> float:
        return 0.0


@dataclass(frozen=True)
class MetaPieces:
    """A replay is what was cut out: the rest has been run when it was captured."""

    calls: list[Callable[..., object]] = field(default_factory=list)

    def replay(self, *args: object) -> None:
        for call in self.calls:
            call(*args)


class MetaDevice:
    """One thread uses it."""

    torch_device = torch.device("meta")
    name = "no GPU"
    num_recordings = 0

    def __init__(self, *, captures: bool = True) -> None:
        self.captures = captures
        self.allocated = 0  # bytes that `zeros` would have taken

    def row_multiple(self, dtype: torch.dtype) -> int:
        return 1

    def submit(self, function: Callable[..., object], *args: object) -> None:
        self.run(function, *args)

    def run(self, function: Callable[..., T], *args: object) -> T:
        with torch.inference_mode():
            return function(*args)

    def record(self) -> MetaEvent:
        return MetaEvent()

    landed = record

    def await_downloads(self) -> None:
        pass

    def upload(self, array: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        source = torch.from_numpy(array).to(self.torch_device)
        if out is None:
            return source
        out[: len(array)].copy_(source)
        return out

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)  # the host may read it

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.allocated += math.prod(shape) * dtype.itemsize
        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def commit_soon(self, parts: Sequence[torch.Tensor]) -> None:
        """There is no memory."""

    def begin_step(self, kind: Hashable) -> None:
        """A GPU is used as a whole."""

    def capture(self, function: Callable[[], object]) -> MetaPieces:
        return self.capture_pieces(lambda cut: function())

    def capture_pieces(self, function: Callable[[Cut], object]) -> MetaPieces:
        pieces = MetaPieces()
        function(lambda call: pieces.calls.append(partial(copy_context().run, call)))
        return pieces

    def free_memory(self) -> int:
        return 2**40

    def close(self) -> None:
        pass
