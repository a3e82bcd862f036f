"""Runs packed steps: setups, copies, page-table patches, the forward pass, sampling. In the stream.

A step costs one host-to-device copy, a handful of small ops around the model, and no host sync.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from minisgl.core.executor import GrammarMasks
from minisgl.device import Device, Event
from minisgl.kernels.advance import prepare_inputs
from minisgl.layers.attention import ForwardInputs
from minisgl.parallel import Communicator
from minisgl.runtime.agreement import compare_ranks
from minisgl.runtime.graphs import DecodeGraphs, Forward, StaticBuffers
from minisgl.runtime.inputs import StepArrays, cascade_words, join, split
from minisgl.runtime.kv_pool import KVPool
from minisgl.runtime.rows import RowBuffers
from minisgl.runtime.sampler import Points, Sampled, Sampler, Sent
from minisgl.trace import span


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Hidden states [T, H]; writes this step's KV."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, vocab] fp32; of use on rank 0 only."""


@dataclass
class Step:
    """A step between dispatch and collect."""

    arrays: StepArrays
    sent: Sent = field(default_factory=dict)
    hidden: torch.Tensor | None = None  # [T, H]
    positions: torch.Tensor | None = None  # [T] int64
    sampled: Sampled = field(default_factory=Sampled)
    events: list[Event] = field(default_factory=list)  # around the forward pass and the sampling

    @property
    def seconds(self) -> float:
        """Device time of both, without the wait for masks that may lie between."""
        begin, forwarded, masked, end = self.events
        return forwarded.seconds_since(begin) + end.seconds_since(masked)


class Runner:
    """One rank's model and buffers. Steps laid out for `graphs`, by width, are replayed by them."""

    def __init__(
        self,
        device: Device,
        model: Model,
        pool: KVPool,
        rows: RowBuffers,
        sampler: Sampler,
        graphs: Mapping[int, DecodeGraphs] | None = None,
        buffers: StaticBuffers | None = None,
        *,
        compare: Communicator | None = None,
    ) -> None:
        """buffers: those of the graphs, where there are any. compare: each step, between ranks."""
        self._device = device
        self._model = model
        self._pool = pool
        self._rows = rows
        self._sampler = sampler
        self._graphs = graphs or {}
        self._staging = None if buffers is None else buffers.staging
        self._compare = compare

    def forward(self, step: Step) -> None:
        """Upload the step and compute its hidden states."""
        step.events.append(self._device.record())
        with span("forward"):
            self._forward(step)
        step.events.append(self._device.record())

    def _forward(self, step: Step) -> None:
        arrays = step.arrays
        staging = self._staging if arrays.replays else None
        sent = self._device.upload(join(arrays.sections), staging)
        step.sent = split(arrays.sections, sent)
        self._rows.apply(step.sent)
        if "copies" in step.sent:
            self._pool.copy(step.sent["copies"].view(-1, 3))
        if arrays.replays:
            graphs = self._graphs[arrays.decode_width]
            half = Forward.GROUPED if "cascade" in step.sent else Forward.PLAIN
            step.hidden, step.positions = graphs.forward(arrays.num_sequences, half)
        else:
            inputs = self._inputs(arrays, step.sent)
            step.hidden, step.positions = self._model.forward(inputs), inputs.positions
        if self._compare is not None:
            compare_ranks(self._compare, arrays, step.hidden)

    def sample(self, step: Step, masks: GrammarMasks | None) -> None:
        """Sample the step's points and move its rows on."""
        step.events.append(self._device.record())
        with span("sample"):
            self._sample(step, masks)
        step.events.append(self._device.record())

    def _sample(self, step: Step, masks: GrammarMasks | None) -> None:
        arrays, device = step.arrays, self._device
        assert step.hidden is not None
        assert step.positions is not None
        graphs = self._graphs[arrays.decode_width] if arrays.replays else None
        if graphs is not None and not (arrays.logprobs or arrays.prompt_logprobs):
            drawn = graphs.sample(arrays, masks)
            if self._sampler.draws:
                step.sampled.drawn = device.download(drawn)
        else:
            points = None
            if graphs is not None:
                points = graphs.points(arrays.num_sequences)
            elif arrays.num_points:
                points = Points.of(arrays, step.sent)
            step.sampled = self._sampler(
                arrays, step.sent, step.hidden, step.positions, points, masks
            )
        step.hidden = step.positions = None
        step.sent = {}

    def _inputs(self, step: StepArrays, sent: Sent) -> ForwardInputs:
        """A ragged step's, in memory of its own."""
        device, tokens = self._device.torch_device, step.num_tokens
        groups, shared = None, None
        if "cascade" in sent:
            groups, shared = sent["cascade"].split(cascade_words(step.num_decode))  # type: ignore[no-untyped-call]
            groups = groups.view(-1, 3)
        inputs = ForwardInputs(
            input_ids=torch.empty(tokens, dtype=torch.int32, device=device),
            positions=torch.empty(tokens, dtype=torch.int64, device=device),
            cu_seqlens_q=sent["offsets"],
            seq_lens=torch.empty(step.num_sequences, dtype=torch.int32, device=device),
            rows=sent["rows"],
            page_table=self._rows.page_table,
            slot_mapping=torch.empty(tokens, dtype=torch.int64, device=device),
            kv=self._pool.layers,
            page_size=self._pool.page_size,
            num_decode=step.num_decode,
            decode_width=step.decode_width,
            max_seqlen_q=step.max_seqlen_q,
            groups=groups,
            shared=shared,
        )
        prepare_inputs(
            inputs.input_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.seq_lens,
            sent["token_ids"],
            sent["sequences"],
            sent["offsets"],
            sent["rows"],
            sent["starts"],
            sent["num_tokens"],
            self._rows.last,
            self._rows.lengths,
            self._rows.page_table,
            self._pool.page_size,
        )
        return inputs
