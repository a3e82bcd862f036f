"""Captured forward passes of decode-only steps, one per padded number of sequences.

All sizes share one set of static input buffers: a smaller graph uses their first entries. On CPU a
replay calls the forward function on the same buffers.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from minisgl.device import Device, Graph
from minisgl.layers.attention import ForwardInputs

Forward = Callable[[ForwardInputs], torch.Tensor]


def padded_sizes(max_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24 and so on, up to at least `max_sequences`."""
    sizes = [1, 2, 4, *range(8, max_sequences + 8, 8)]
    return tuple(
        size for size, below in zip(sizes, [0, *sizes[:-1]], strict=True) if below < max_sequences
    )


class DecodeGraphs:
    """Graphs for steps of `sizes` sequences with `width` tokens each. Used inside the stream."""

    def __init__(
        self,
        device: Device,
        forward: Forward,
        page_table: torch.Tensor,
        kv: Sequence[tuple[torch.Tensor, torch.Tensor]],
        page_size: int,
        sizes: Sequence[int],
        width: int = 1,
    ) -> None:
        self.sizes = tuple(sorted(sizes))
        self.width = width
        self._device = device
        self._forward = forward
        self._graphs: dict[int, Graph] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        most = self.sizes[-1]
        input_ids = device.zeros((most * width,), torch.int32)
        positions = device.zeros((most * width,), torch.int64)
        slot_mapping = device.zeros((most * width,), torch.int64)
        seq_lens = device.zeros((most,), torch.int32)
        rows = device.zeros((most,), torch.int32)
        offsets = torch.arange(most + 1, dtype=torch.int32, device=device.torch_device) * width
        slot_mapping.fill_(-1)
        self.inputs = {
            size: ForwardInputs(
                input_ids=input_ids[: size * width],
                positions=positions[: size * width],
                cu_seqlens_q=offsets[: size + 1],
                seq_lens=seq_lens[:size],
                rows=rows[:size],
                page_table=page_table,
                slot_mapping=slot_mapping[: size * width],
                kv=kv,
                page_size=page_size,
                num_decode=size,
                decode_width=width,
            )
            for size in self.sizes
        }

    def capture(self, progress: Callable[[Sequence[int]], Iterable[int]] = list) -> None:
        """Capture every size, the largest first, so that smaller ones reuse its memory.

        `progress` wraps the sizes to show how far it is.
        """
        for size in progress(self.sizes[::-1]):
            self._graphs[size] = self._device.capture(self._call(size))

    def _call(self, size: int) -> Callable[[], None]:
        def call() -> None:
            self._hidden[size] = self._forward(self.inputs[size])

        return call

    def replay(self, size: int) -> torch.Tensor:
        """Hidden states [size * width, H] of what lies in `inputs[size]`; overwritten by the next
        replay of any size."""
        self._graphs[size].replay()
        return self._hidden[size]
