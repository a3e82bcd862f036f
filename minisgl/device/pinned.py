"""A ring of pinned host memory, which a device copies from and to by itself.

Page-locking memory takes milliseconds and stops the device, so it happens once. A span is given out
again when the copy that uses it, or its reader, is done.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

ALIGNMENT = 64  # bytes


@dataclass
class _Span:
    begin: int
    is_free: Callable[[], bool]


class PinnedRing:
    """Spans of one piece of host memory, in the order they are taken. For one thread."""

    def __init__(self, memory: torch.Tensor) -> None:
        """memory: [bytes] uint8."""
        self._memory = memory
        self._spans: deque[_Span] = deque()  # oldest first
        self._head = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A dense tensor of unknown content, to be followed by `hold`; None when there is no room.

        Never waits for a span that is still in use.
        """
        size = dtype.itemsize * math.prod(shape)
        length = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        while self._spans and self._spans[0].is_free():
            self._spans.popleft()
        begin, limit = 0, self._memory.numel()
        if self._spans:
            tail = self._spans[0].begin
            begin = self._head
            if begin <= tail:  # the ring has wrapped around
                limit = tail
            elif begin + length > limit:
                begin, limit = 0, tail
        if begin + length > limit:
            return None
        self._spans.append(_Span(begin, _never))
        self._head = begin + length
        return self._memory[begin : begin + size].view(dtype).view(shape)

    def hold(self, is_free: Callable[[], bool]) -> None:
        """Keep the span last taken until `is_free()`."""
        self._spans[-1].is_free = is_free


def _never() -> bool:
    return False
