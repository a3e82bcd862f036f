"""Decode steps as two captured halves: token ids to hidden states, and those to the next tokens.

The host may fill grammar masks between the two, while the first one runs. There is a pair for every
padded number of sequences and every width (tokens per sequence: 1 + drafts). All work on one set of
static buffers, of which a smaller graph uses the first entries; a step's one upload fills `staging`
and nothing else is needed to replay it. A sequence with fewer tokens than the width is padded.

Steps with cascade groups have a first half of their own, whose launches cover as many groups as a
batch may have: those that are missing are empty. So a step without groups pays nothing for them.

On a CPU a graph is a tape (`device/tape.py`), recorded at the first step of its size and width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum, auto
from functools import cache, partial

import torch

from minisgl.core.executor import GrammarMasks
from minisgl.device import Device, Graph
from minisgl.kernels.advance import prepare_points
from minisgl.layers.attention import ForwardInputs
from minisgl.step.inputs import PackedBatch, pack_masks
from minisgl.step.kv_pool import KVPool
from minisgl.step.ragged import equal_sequences, fill_inputs
from minisgl.step.rows import RowBuffers
from minisgl.step.sampler import Masks, Points, Sampler, Shaping
from minisgl.step.sizes import GraphSizes, cascade_words, decode_words, mask_words

Pass = Callable[[ForwardInputs], torch.Tensor]
Progress = Callable[[Sequence[int]], Iterable[int]]


class Forward(Enum):
    """The first halves; the second ones go by `Shaping`."""

    PLAIN = auto()
    GROUPED = auto()  # of steps with cascade groups


class StaticBuffers:
    """What every decode graph reads and writes. Made inside the stream, never moved."""

    def __init__(self, device: Device, vocab: int, sizes: GraphSizes) -> None:
        tokens, sequences = sizes.max_tokens, sizes.max_sequences
        self.mask_words = mask_words(vocab)
        self.staging = device.zeros((sizes.staging_words,), torch.int32)
        self.masks = device.zeros((tokens * (1 + self.mask_words),), torch.int32)
        self.input_ids = device.zeros((tokens,), torch.int32)
        self.positions = device.zeros((tokens,), torch.int64)
        self.slot_mapping = device.zeros((tokens,), torch.int64)
        self.seq_lens = device.zeros((sequences,), torch.int32)
        self.sampled = device.zeros((tokens + sequences,), torch.int32)  # then drafts accepted


class DecodeGraphs:
    """The graphs of steps with `width` tokens per sequence. Used inside the stream."""

    def __init__(
        self,
        device: Device,
        forward: Pass,
        sampler: Sampler,
        pool: KVPool,
        rows: RowBuffers,
        buffers: StaticBuffers,
        sizes: Sequence[int],
        width: int = 1,
    ) -> None:
        self.sizes = tuple(sorted(sizes))
        self.width = width
        self._device = device
        self._forward = forward
        self._sampler = sampler
        self.pool = pool
        self.rows = rows
        self.buffers = buffers
        self._views_of = cache(partial(_Views, self))
        self._graphs: dict[tuple[int, Forward | Shaping], Graph] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._shared: torch.Tensor | None = None
        self.sequences, self.offsets = equal_sequences(device, self.sizes[-1], width)

    @property
    def captured(self) -> set[tuple[int, Forward | Shaping]]:
        """Sizes and halves that there are graphs of so far."""
        return set(self._graphs)

    def capture(self, progress: Progress = list, *, cascade: bool = False) -> None:
        """Capture every half, the largest first, so that smaller ones reuse its memory.

        `progress` wraps the sizes to show how far it is. `cascade`: those with groups too.
        """
        halves = [Forward.PLAIN, *Shaping, *([Forward.GROUPED] if cascade else [])]
        for size in progress(self.sizes[::-1]):
            views = self._views_of(size)
            views.token_ids.zero_()
            views.inputs.rows.fill_(self.rows.padding)
            views.starts.zero_()
            views.num_tokens.zero_()
            views.masks.indices.fill_(-1)
            for part in (views.grouped.groups, views.grouped.shared):
                assert part is not None
                part.zero_()
            self._graph(size, Forward.PLAIN).replay()  # second halves are captured on real values
            for half in halves:
                self._graph(size, half)

    def forward(self, size: int, half: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay a first half on what lies in `staging`.

        Returns hidden states [size * width, H] and positions [size * width] int64, both overwritten
        by a later replay.
        """
        self._graph(size, half).replay()
        return self._hidden[size], self._views_of(size).inputs.positions

    def sample(self, step: PackedBatch, masks: GrammarMasks | None) -> torch.Tensor:
        """Replay the second half, which moves the rows on.

        Returns tokens [size * width] int32, one behind every token of the step, and where the width
        is more than 1, accepted drafts [size] after them; overwritten by the next such replay.
        """
        size = step.num_sequences
        shaping = Shaping.ADJUSTED if step.adjusts else Shaping.PLAIN
        if masks is not None and masks.indices:
            shaping = Shaping.MASKED
            packed = pack_masks(step, masks, size * self.width)
            self._device.upload(packed, self.buffers.masks)
        self._device.await_downloads()
        self._graph(size, shaping).replay()
        return self._views_of(size).sampled

    def points(self, size: int) -> Points:
        """Every token of the step in `staging` as a point, drafts as they were computed."""
        views = self._views_of(size)
        inputs = views.inputs
        rows, positions, drafts, before = prepare_points(
            inputs.input_ids, inputs.positions, inputs.rows, views.num_tokens
        )
        return Points(
            tokens=None,
            ids=inputs.input_ids,
            rows=rows,
            positions=positions,
            first=inputs.cu_seqlens_q[:-1],
            sequence_rows=inputs.rows,
            drafts=drafts,
            before=before,
        )

    def _graph(self, size: int, half: Forward | Shaping) -> Graph:
        graph = self._graphs.get((size, half))
        if graph is None:  # while capturing, or on a device where that costs nothing
            run = self._call_forward if isinstance(half, Forward) else self._call_sampling
            graph = self._device.capture(partial(run, size, half))
            self._graphs[size, half] = graph
        return graph

    def _call_forward(self, size: int, half: Forward) -> None:
        views = self._views_of(size)
        inputs = views.grouped if half is Forward.GROUPED else views.inputs
        fill_inputs(
            inputs, self.rows, views.token_ids, views.sequences, views.starts, views.num_tokens
        )
        hidden = self._forward(inputs)
        if not self._device.captures:
            self._share_hidden(size, hidden)
        elif half is Forward.GROUPED and size in self._hidden:
            self._hidden[size].copy_(hidden)  # where captured second halves read it
        else:
            self._hidden[size] = hidden

    def _share_hidden(self, size: int, hidden: torch.Tensor) -> None:
        """Where sizes are many, in one buffer for all: the second half of the last one reads it."""
        if self._shared is None:
            most = self.sizes[-1] * self.width
            self._shared = hidden.new_empty((most, hidden.shape[1]))
        self._hidden[size] = self._shared[: len(hidden)].copy_(hidden)

    def _call_sampling(self, size: int, shaping: Shaping) -> None:
        views = self._views_of(size)
        tokens, accepted, _ = self._sampler.draw(
            self._hidden[size], self.points(size), shaping, views.masks
        )
        views.sampled[: len(tokens)].copy_(tokens)
        if self.width > 1:
            views.sampled[len(tokens) :].copy_(accepted)


class _Views:
    """The static buffers as the graphs of one size see them: inputs, and the same with cascade
    groups; token_ids, sequences [size * width]; starts, num_tokens [size]."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        buffers, width, tokens = graphs.buffers, graphs.width, size * graphs.width
        lengths = (*decode_words(size, width), *cascade_words(size))
        parts = buffers.staging[: sum(lengths)].split(lengths)  # type: ignore[no-untyped-call]
        self.token_ids, rows, self.starts, self.num_tokens, groups, shared = parts
        self.sequences = graphs.sequences[:tokens]
        self.inputs = ForwardInputs(
            input_ids=buffers.input_ids[:tokens],
            positions=buffers.positions[:tokens],
            cu_seqlens_q=graphs.offsets[: size + 1],
            seq_lens=buffers.seq_lens[:size],
            rows=rows,
            page_table=graphs.rows.page_table,
            slot_mapping=buffers.slot_mapping[:tokens],
            kv=graphs.pool.layers,
            page_size=graphs.pool.page_size,
            num_decode=size,
            decode_width=width,
        )
        self.grouped = replace(self.inputs, groups=groups.view(-1, 3), shared=shared)
        indices, bits = buffers.masks[: tokens * (1 + buffers.mask_words)].tensor_split((tokens,))
        self.masks = Masks(indices, bits.view(tokens, buffers.mask_words))  # of every point
        # [size * width] tokens, and [size] accepted drafts if the width is > 1
        self.sampled = buffers.sampled[: tokens if width == 1 else tokens + size]
