"""`Peers`: one rank's end of the all-reduce kernels, once its memory and its peers' is mapped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from minisgl import csrc
from minisgl.kernels.all_reduce import CAPACITY, SumPath, choose

BLOCKS = 64  # of every call of a communicator; a grid that changed would break the protocol
PACK_BYTES = 16
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
STOPPED = 0x100  # written by the host, it ends all waits; kernels write the protocol's fault_code


class Word(Protocol):
    """`memory.HostWord`."""

    value: int

    @property
    def address(self) -> int: ...


@dataclass(frozen=True)
class Segment:
    """How a rank's memory is laid out: its signal, then two halves of CAPACITY bytes."""

    signal_bytes: int
    half_bytes: int = CAPACITY

    @property
    def data_offset(self) -> int:
        return -(-self.signal_bytes // 256) * 256

    @property
    def num_bytes(self) -> int:
        return self.data_offset + 2 * self.half_bytes


def native_module(device: torch.device) -> ModuleType:
    """The kernels for a device, built if need be. RuntimeError: they cannot be (see the log)."""
    major, minor = torch.cuda.get_device_capability(device)
    module = csrc.load("all_reduce", f"{major}{minor}{'a' if major >= 9 else ''}", wait=True)
    if module is None:
        raise RuntimeError("the all-reduce kernels could not be built")
    return module


class Peers:
    """Enqueues all-reduces on the device's current stream; they take part in captured graphs.

    Every rank makes the same calls in the same order, all of them in one order of streams. For
    calls above the table's sizes, and of other types than bf16, fp16 and fp32, the methods return
    None, on every rank alike.
    """

    def __init__(
        self,
        native: Any,
        rank: int,
        addresses: Sequence[int],
        word: Word,
        *,
        stream: Callable[[], int],
        segment: Segment,
        multicast: tuple[int, int] | None = None,
        ordered: bool = False,
        blocks: int = BLOCKS,
        timeout: float,
    ) -> None:
        """addresses: of every rank's segment, as mapped here. multicast: the address that means
        all replicas, and this rank's own replica. timeout: seconds a kernel waits for a peer."""
        self.rank = rank
        self.size = len(addresses)
        self._ordered = ordered
        self._word = word
        self._stream = stream
        self._half_bytes = segment.half_bytes
        self._max_row_bytes = native.MAX_ROW_BYTES
        self.multimem = multicast is not None
        everywhere, replica = multicast or (0, 0)
        self._native = native.Rank(
            rank,
            list(addresses),
            [address + segment.data_offset for address in addresses],
            everywhere,
            replica,
            segment.half_bytes,
            word.address,
            blocks,
            timeout,
        )

    def path(self, x: torch.Tensor) -> SumPath | None:
        """The path of a call on `x`; None where these kernels do not take it."""
        if x.dtype not in TYPES:
            return None
        return choose(x.nbytes, self.size, multimem=self.multimem, ordered=self._ordered)

    def all_reduce(self, x: torch.Tensor, path: SumPath | None = None) -> torch.Tensor | None:
        """The sum of all ranks' `x` by `path` (the table's when None); may reuse `x`."""
        path = self.path(x) if path is None else path
        if path is None or x.numel() == 0:
            return None if path is None else x
        flat = x.contiguous().view(-1)
        packs = -(-flat.nbytes // PACK_BYTES)
        if packs * PACK_BYTES != flat.nbytes:
            flat = F.pad(flat, (0, packs * PACK_BYTES // flat.element_size() - flat.numel()))
        flat = _aligned(flat)
        address = flat.data_ptr()
        for begin in range(0, flat.nbytes, self._half_bytes):
            size = min(self._half_bytes, flat.nbytes - begin)
            place = address + begin
            self._native.all_reduce(path, TYPES[x.dtype], place, place, size, self._stream())
        return flat[: x.numel()].view(x.shape)

    def all_reduce_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        unit_offset: bool,
        path: SumPath | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`all_reduce_norm_reference` of all ranks' `x` [T, H]; may reuse `x`.

        None also where a row is no whole number of 16 bytes, or too long for shared memory.
        ValueError: residual or weight of another shape or type.
        """
        rows, size = x.shape
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(f"residual must be like x {list(x.shape)}, got {list(residual.shape)}")
        if weight.shape != (size,) or weight.dtype != x.dtype:
            raise ValueError(f"weight must be [{size}] {x.dtype}, got {list(weight.shape)}")
        path = self.path(x) if path is None else path
        row_bytes = size * x.element_size()
        if path is None or row_bytes % PACK_BYTES or row_bytes > self._max_row_bytes:
            return None
        x, residual, weight = (_aligned(t.contiguous()) for t in (x, residual, weight))
        out, at_once = torch.empty_like(x), self._half_bytes // row_bytes
        for begin in range(0, rows, at_once):
            offset = begin * row_bytes
            self._native.all_reduce_norm(
                path,
                TYPES[x.dtype],
                x.data_ptr() + offset,
                residual.data_ptr() + offset,
                weight.data_ptr(),
                out.data_ptr() + offset,
                x.data_ptr() + offset,
                min(at_once, rows - begin),
                row_bytes,
                eps,
                unit_offset,
                self._stream(),
            )
        return out, x

    def check(self) -> None:
        """RuntimeError if a kernel that has ended gave up waiting. No synchronisation."""
        code = self._word.value
        rank, awaited = code >> 4 & 15, code & 15
        if code and rank == awaited:
            raise RuntimeError("the all-reduces of this rank were stopped")
        if code:
            raise RuntimeError(f"rank {rank} waited for rank {awaited} in vain in an all-reduce")

    def abort(self) -> None:
        """From any thread: end all waits of this rank's kernels, now and later."""
        self._word.value = STOPPED


def _aligned(x: torch.Tensor) -> torch.Tensor:
    return x if x.data_ptr() % PACK_BYTES == 0 else x.clone()
