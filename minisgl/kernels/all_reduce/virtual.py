"""All ranks of an all-reduce on one GPU, in one process: for tests and benchmarks.

The kernels, the protocol and the memory's layout are those of real ranks; only the mapping is not
needed. Ranks wait for each other inside kernels, so all their blocks must fit on the GPU at once,
and none may be queued behind one that waits for it: see `QUEUES`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch

from minisgl.kernels.all_reduce.memory import HostWord, PeerBuffer
from minisgl.kernels.all_reduce.peers import BLOCKS, Peers, Segment, native_module

T = TypeVar("T")
# For the environment, before CUDA starts. By default streams share 8 hardware queues, which keep
# their order; 8 ranks and the process's own streams are more, so two ranks may share a queue. If
# the second call of one is queued before the first of the other, that first call can never start,
# and both ranks wait for ever.
QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
SPARE_BYTES = (1 << 19, 1 << 26)  # for each stream's outputs, small and large


class VirtualRanks:
    """`size` ranks, each with a stream of its own. Close it after use."""

    def __init__(
        self,
        size: int,
        device: torch.device,
        *,
        ordered: bool = False,
        blocks: int | None = None,
        half_bytes: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        """blocks: of each rank; as many as fit at most when None. timeout: seconds."""
        native = native_module(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = min(BLOCKS, processors // size) if blocks is None else blocks
        if blocks * size > processors:
            raise ValueError(f"{size} ranks x {blocks} blocks must fit on {processors} processors")
        segment = Segment(native.SIGNAL_BYTES)
        if half_bytes is not None:
            segment = Segment(native.SIGNAL_BYTES, half_bytes)
        self._resources = ExitStack()
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(size)]
        # A call that had to ask the driver for memory could wait for a kernel that waits for it.
        for stream in self.streams:
            with torch.cuda.stream(stream):
                kept = [torch.empty(n, dtype=torch.uint8, device=device) for n in SPARE_BYTES]
                del kept
        buffers, words = [], []
        for _ in range(size):
            buffers.append(PeerBuffer(segment.num_bytes))
            self._resources.callback(buffers[-1].close)
            words.append(HostWord())
            self._resources.callback(words[-1].close)
        self._resources.callback(torch.cuda.synchronize, device)
        self.ranks = [
            Peers(
                native,
                rank,
                [buffer.address for buffer in buffers],
                words[rank],
                stream=lambda: torch.cuda.current_stream(device).cuda_stream,
                segment=segment,
                ordered=ordered,
                blocks=blocks,
                timeout=timeout,
            )
            for rank in range(size)
        ]

    def run(self, call: Callable[[Peers], T], ranks: Sequence[int] | None = None) -> list[T]:
        """`call` on every rank's stream, behind the current one, which then waits for them all.

        It may enqueue one all-reduce only, so that no rank's second call comes before another's
        first.
        """
        current = torch.cuda.current_stream(self.device)
        results = []
        chosen = range(len(self.ranks)) if ranks is None else ranks
        for rank in chosen:
            self.streams[rank].wait_stream(current)
        for rank in chosen:
            with torch.cuda.stream(self.streams[rank]):
                results.append(call(self.ranks[rank]))
        for rank in chosen:
            current.wait_stream(self.streams[rank])
        return results

    def check(self) -> None:
        """RuntimeError if any rank gave up waiting."""
        for rank in self.ranks:
            rank.check()

    def close(self) -> None:
        self._resources.close()
