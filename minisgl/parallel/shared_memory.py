"""`SharedMemory`: ranks on the CPUs of one machine communicate through memory that all of them map.

The work is done by `rank_ops` (csrc/cpu/rank_ops.cpp); where it is not built, `TorchGroup` serves.
"""

import os

import torch

from minisgl import csrc
from minisgl.parallel import Communicator
from minisgl.trace import ranged

SLOT_BYTES = 1 << 18  # what a rank publishes at once; twice this is kept per rank
TIMEOUT = 1800.0  # seconds to wait for a rank that lives: loading may take one far longer


def available() -> bool:
    """Whether the native part is built; its build starts at the first call."""
    return csrc.load("rank_ops") is not None and hasattr(os, "memfd_create")


def create(size: int) -> int:
    """A descriptor of memory for `size` ranks, to be handed to each. It has no name: nothing
    is left of it however its users end, and is not bound by the size of /dev/shm."""
    native = csrc.load("rank_ops", wait=True)
    assert native is not None
    fd = os.memfd_create("minisgl-ranks")
    os.ftruncate(fd, native.Group.bytes_needed(size, SLOT_BYTES))
    return fd


class SharedMemory(Communicator):
    """Sums in rank order at every size, in fp32. The caller keeps and closes `fd`."""

    def __init__(self, fd: int, rank: int, size: int, timeout: float = TIMEOUT) -> None:
        native = csrc.load("rank_ops", wait=True)
        if native is None:
            raise RuntimeError("ranks that share memory need the native module rank_ops")
        super().__init__(rank, size)
        self._group = native.Group(fd, rank, size, SLOT_BYTES, timeout)

    @ranged("all_reduce", is_detail=True)
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self.all_reduce(x.float()).to(x.dtype)
        x = x.contiguous()
        self._group.all_reduce(x.data_ptr(), x.numel(), x.dtype == torch.bfloat16)
        return x

    @ranged("gather", is_detail=True)
    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        x, each = x.contiguous(), x.shape[-1]
        width, size = width or self.size * each, x.element_size()
        out = x.new_empty((*x.shape[:-1], width)) if self.rank == 0 else x
        rows = x.numel() // max(each, 1)
        self._group.gather(x.data_ptr(), out.data_ptr(), rows, each * size, width * size)
        return out

    @ranged("broadcast", is_detail=True)
    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._group.broadcast(x.data_ptr(), x.numel() * x.element_size())
        return x

    def abort(self) -> None:
        self._group.abort()
