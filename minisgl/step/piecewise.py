"""Piecewise graphs: forward passes of mixed steps, captured but for attention.

A step that prefills has sequences of any lengths, which attention's launches depend on. Everything
else in a pass treats tokens one by one: it is captured for padded numbers of tokens, in pieces that
end where a layer attends and begin again behind it, on static tensors. Between two pieces attention
runs eagerly, on two tensors that the pieces share with it: its queries and its output.

    piece 0     embedding ... layer 0's queries, keys and values       attention of layer 0
    piece i     layer i - 1's projection ... layer i's queries ...     attention of layer i
    piece L     layer L - 1's projection ... the last norm

Padding is an empty sequence behind the others: its keys are not written, and it attends to nothing.
On a device without graphs a replay is one pass on the same tensors, with attention in its place.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from minisgl.device import Cut, Device, Graph
from minisgl.layers.attention import KV, Attention, AttentionSlices, ForwardInputs
from minisgl.step.graphs import Pass

TOKENS = (torch.int32, torch.int64, torch.int64)  # input_ids, positions, slot_mapping


class PiecewiseGraphs:
    """The passes over each of `sizes` tokens. Used inside the stream."""

    def __init__(self, device: Device, forward: Pass, sizes: Sequence[int]) -> None:
        """sizes: rising. The first pass allocates what all of them share."""
        self.sizes = tuple(sizes)
        self._device = device
        self._forward = forward
        self._tokens = [device.zeros((max(sizes, default=0),), dtype) for dtype in TOKENS]
        self._graphs: dict[int, Graph] = {}
        # Attention's queries and output, [most, Hq, D] each, of one layer after another.
        self._shared: tuple[torch.Tensor, torch.Tensor] | None = None
        self._hidden: torch.Tensor | None = None  # [most, H]

    @property
    def captured(self) -> tuple[int, ...]:
        """Sizes that there are graphs of, in the order in which they were captured."""
        return tuple(self._graphs)

    @property
    def scratch(self) -> list[torch.Tensor]:
        """What every pass writes before it reads it, [most, ...] each; allocated by the first."""
        return [x for x in (*(self._shared or ()), self._hidden) if x is not None]

    def tokens(self, size: int) -> list[torch.Tensor]:
        """input_ids, positions and slot_mapping of a pass over `size` tokens, to be filled."""
        return [tensor[:size] for tensor in self._tokens]

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Hidden states [T, H], overwritten by a later pass. The tokens of `inputs` are `tokens`.

        A size is captured when it first comes: on a GPU before serving, the largest first.
        """
        size = inputs.input_ids.shape[0]
        graph = self._graphs.get(size)
        if graph is None:
            run = partial(self._pass, _without_sequences(inputs))
            graph = self._graphs[size] = self._device.capture_pieces(run)
        graph.replay(inputs, AttentionSlices.of(inputs))
        assert self._hidden is not None
        return self._hidden[:size]

    def _pass(self, inputs: ForwardInputs, cut: Cut) -> None:
        hidden = self._forward(replace(inputs, attend=partial(self._attend, cut)))
        if self._hidden is None:
            self._hidden = hidden.new_zeros((self.sizes[-1], hidden.shape[1]))
        self._hidden[: len(hidden)].copy_(hidden)

    def _attend(
        self, cut: Cut, layer: Attention, x: torch.Tensor, inputs: ForwardInputs, kv: KV
    ) -> torch.Tensor:
        """Write the queries to the shared tensor; cut. A replay attends by the step's inputs."""
        if self._shared is None:
            most = self.sizes[-1], layer.num_heads, kv[0].shape[2]
            self._shared = x.new_zeros(most), x.new_zeros(most)
        q, attended = (tensor[: len(x)] for tensor in self._shared)
        layer.queries_writing_kv(x, inputs, kv, out=q)
        cut(partial(layer.attend, q, kv, out=attended))
        return attended


def _without_sequences(inputs: ForwardInputs) -> ForwardInputs:
    """The inputs without their sequences: the pieces know only a step's tokens."""
    return replace(
        inputs,
        cu_seqlens_q=inputs.cu_seqlens_q[:1],
        seq_lens=inputs.seq_lens[:0],
        rows=inputs.rows[:0],
        num_decode=0,
        groups=None,
        shared=None,
    )
