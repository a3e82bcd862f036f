"""Runs packed steps: setups, copies, page-table patches, the forward pass, sampling. In the stream.

A step costs one host-to-device copy, a handful of small ops around the model, and no host sync.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from minisgl.core.executor import GrammarMasks, Limits
from minisgl.device import Device, Event
from minisgl.layers.attention import ForwardInputs
from minisgl.parallel import Communicator
from minisgl.step.agreement import compare_ranks
from minisgl.step.draft import Draft, DraftRunner
from minisgl.step.graphs import DecodeGraphs, Forward, StaticBuffers
from minisgl.step.inputs import PackedBatch, Sent, join
from minisgl.step.kv_pool import KVPool, KVShape
from minisgl.step.piecewise import PiecewiseGraphs
from minisgl.step.ragged import RAGGED, ragged_inputs
from minisgl.step.rows import RowBuffers
from minisgl.step.sampler import Points, Sampled, Sampler
from minisgl.step.sizes import Geometry, GraphSizes, cascade_words
from minisgl.trace import ranged, span


class Model(Protocol):
    """What the runner needs of a model."""

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Hidden states [T, H]; writes this step's KV."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> [N, vocab] fp32; valid on rank 0 only."""


@dataclass
class Step:
    """A step between dispatch and collect."""

    packed: PackedBatch
    sent: Sent | None = None  # between `begin` and the sampling
    input_ids: torch.Tensor | None = None  # [T] int32, of a ragged step
    drafted: torch.Tensor | None = None  # [D, K] int32, proposals; on the host once they landed
    hidden: torch.Tensor | None = None  # [T, H]
    positions: torch.Tensor | None = None  # [T] int64
    sampled: Sampled = field(default_factory=Sampled)
    events: list[Event] = field(default_factory=list)  # around the forward pass and the sampling
    num_recordings: int = 0  # within the step, once it is sampled

    @property
    def seconds(self) -> float:
        """Device time of both, without the wait for masks that may lie between.

        0 where a graph was recorded: no other step of this kind will take as long.
        """
        if self.num_recordings:
            return 0.0
        begin, forwarded, masked, end = self.events
        return forwarded.seconds_since(begin) + end.seconds_since(masked)


class Runner:
    """Runs the steps of one rank. Those laid out for a decode graph replay it."""

    def __init__(
        self,
        device: Device,
        model: Model,
        shape: KVShape,
        limits: Limits,
        geometry: Geometry,
        graphs: GraphSizes,
        comm: Communicator,
        draft: Draft | None,
        compare: bool,
    ) -> None:
        """Allocates the pool and the rows of `limits`, and what all `graphs` share; in the stream.

        compare: every step checks that all ranks of `comm` compute the same.
        """
        self._device = device
        self._model = model
        self._compare = comm if compare else None
        self._pool = pool = KVPool(device, shape, limits.num_pages, limits.page_size)
        pages, vocab = geometry.page_table_width, limits.vocab_size
        self.rows = rows = RowBuffers(device, limits.max_rows, pages, vocab)
        self.draft: DraftRunner | None = None
        if draft is not None:
            sizes, some = geometry.draft_sizes, bool(graphs.by_width)
            self.draft = DraftRunner(device, draft, limits, rows, comm, sizes, graphs=some)
        keeps_previous = draft is not None
        sampler = Sampler(device, model.logits, rows, comm, keeps_previous=keeps_previous)
        self._sampler = sampler
        buffers = StaticBuffers(device, vocab, graphs)
        self._staging = buffers.staging  # where steps of decode graphs are uploaded to
        self.graphs = {
            width: DecodeGraphs(device, model.forward, sampler, pool, rows, buffers, sizes, width)
            for width, sizes in graphs.by_width.items()
        }
        self.pieces = PiecewiseGraphs(device, model.forward, graphs.pieces)

    @ranged("begin")
    def begin(self, step: Step) -> None:
        """Upload the step, and let the draft model propose what it asks for."""
        step.events.append(self._device.record())
        step.num_recordings = -self._device.num_recordings
        packed = step.packed
        staging = self._staging if packed.replays else None
        words = self._device.upload(join(packed.sections), staging)
        step.sent = sent = Sent(packed.sections, words)
        self.rows.apply(sent)
        if "patch_page" in packed.sections:
            last = int(packed.sections["patch_page"].max())
            self._pool.use(last)
            if self.draft is not None:
                self.draft.use(last)
        if "copies" in sent:
            self._pool.copy(sent["copies"].view(-1, 3))
        if self.draft is not None:
            if "copies" in sent:
                self.draft.copy(sent["copies"].view(-1, 3))
            drafted = self.draft.run(packed, sent)
            if drafted is not None and self._sampler.draws:
                step.drafted = self._device.download(drafted.clone())

    def forward(self, step: Step) -> None:
        """Compute the step's hidden states, after `begin`, which is called here if it was not."""
        if step.sent is None:
            self.begin(step)
        with span("forward"):
            self._forward(step)
        step.events.append(self._device.record())

    def _forward(self, step: Step) -> None:
        packed, sent = step.packed, step.sent
        assert sent is not None
        size = packed.num_sequences, packed.decode_width
        self._device.begin_step(size if packed.replays else None)
        if packed.replays:
            graphs = self.graphs[packed.decode_width]
            half = Forward.GROUPED if "cascade" in sent else Forward.PLAIN
            step.hidden, step.positions = graphs.forward(packed.num_sequences, half)
        else:
            groups, shared = None, None
            pieces = self.pieces if packed.in_pieces else None
            if "cascade" in sent:
                words = cascade_words(packed.num_decode)
                groups, shared = sent["cascade"].split(words)  # type: ignore[no-untyped-call]
                groups = groups.view(-1, 3)
            inputs = ragged_inputs(
                self.rows,
                self._pool,
                *(sent[name] for name in RAGGED),
                num_decode=packed.num_decode,
                decode_width=packed.decode_width,
                max_seqlen_q=packed.max_seqlen_q,
                groups=groups,
                shared=shared,
                tokens=None if pieces is None else pieces.tokens(packed.num_tokens),
            )
            forward = self._model.forward if pieces is None else pieces.forward
            step.hidden, step.positions = forward(inputs), inputs.positions
            step.input_ids = inputs.input_ids
        if self._compare is not None:
            compare_ranks(self._compare, packed, step.hidden)

    @ranged("sample")
    def sample(self, step: Step, masks: GrammarMasks | None) -> None:
        """Sample the step's points and move its rows on."""
        step.events.append(self._device.record())
        packed, device = step.packed, self._device
        assert step.sent is not None
        assert step.hidden is not None
        assert step.positions is not None
        graphs = self.graphs[packed.decode_width] if packed.replays else None
        if graphs is not None and not (packed.logprobs or packed.prompt_logprobs):
            drawn = graphs.sample(packed, masks)
            if self._sampler.draws:
                step.sampled.drawn = device.download(drawn)
        else:
            points = None
            if graphs is not None:
                points = graphs.points(packed.num_sequences)
            elif packed.num_points:
                assert step.input_ids is not None
                points = Points.of(packed, step.sent, step.input_ids, step.positions)
            step.sampled = self._sampler(packed, step.sent, step.hidden, points, masks)
        step.hidden = step.positions = step.input_ids = step.sent = None
        step.num_recordings += device.num_recordings
        step.events.append(self._device.record())
