"""Runs packed steps: setups, copies, page-table patches, the forward pass, sampling. In the stream.

A step costs one host-to-device copy, a handful of small ops around the model, and no host sync.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from minisgl.core.executor import GrammarMasks
from minisgl.device import Device, Event
from minisgl.kernels.advance import prepare_inputs
from minisgl.layers.attention import ForwardInputs
from minisgl.parallel import Communicator
from minisgl.runtime.graphs import DecodeGraphs
from minisgl.runtime.inputs import StepArrays, join, split
from minisgl.runtime.kv_pool import KVPool
from minisgl.runtime.rows import RowBuffers
from minisgl.runtime.sampler import Sampled, Sampler, Sent


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
    """One rank's model and buffers. Without `graphs` every step runs eagerly."""

    def __init__(
        self,
        device: Device,
        model: Model,
        pool: KVPool,
        rows: RowBuffers,
        comm: Communicator,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._device = device
        self._model = model
        self._pool = pool
        self._rows = rows
        self._graphs = graphs
        self._sampler = Sampler(device, model.logits, rows, comm)

    def forward(self, step: Step) -> None:
        """Upload the step and compute its hidden states."""
        arrays = step.arrays
        step.events.append(self._device.record())
        sent = step.sent = split(arrays.sections, self._device.upload(join(arrays.sections)))
        self._rows.apply(sent)
        if "copies" in sent:
            self._pool.copy(sent["copies"].view(-1, 3))
        graph = self._graph_for(arrays)
        inputs = self._eager_inputs(arrays, sent) if graph is None else graph
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
        step.positions = inputs.positions
        if graph is not None and self._graphs is not None:
            inputs.rows.copy_(sent["rows"])
            step.hidden = self._graphs.replay(arrays.num_sequences)
        else:
            step.hidden = self._model.forward(inputs)
        step.events.append(self._device.record())

    def sample(self, step: Step, masks: GrammarMasks | None) -> None:
        """Sample the step's points and move its rows on."""
        assert step.hidden is not None
        assert step.positions is not None
        step.events.append(self._device.record())
        step.sampled = self._sampler(step.arrays, step.sent, step.hidden, step.positions, masks)
        step.hidden = step.positions = None
        step.sent = {}
        step.events.append(self._device.record())

    def _graph_for(self, step: StepArrays) -> ForwardInputs | None:
        graphs = self._graphs
        decode_only = step.num_decode == step.num_sequences
        if graphs is None or not decode_only or step.decode_width != graphs.width:
            return None
        return graphs.inputs.get(step.num_sequences)

    def _eager_inputs(self, step: StepArrays, sent: Sent) -> ForwardInputs:
        device, tokens = self._device.torch_device, step.num_tokens
        return ForwardInputs(
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
        )
