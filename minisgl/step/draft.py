"""The draft model's part of a step, which comes before the target's forward pass. In the stream.

Its KV lies in a pool of its own, on the target's pages and by the target's page tables. First it
computes the step's draft chunks. Then it proposes, for each row that is to have drafts, in passes:

    pass 0      the row's last two tokens    draft 0 from the second
    pass j      draft j - 1                  draft j

where draft j is sampled as the target would: with the row's parameters, penalties along the path,
and the noise of its position. Two tokens, for after a step whose drafts were all accepted the last
of them has no KV here yet; otherwise the first is written once more, as it was. Rejected drafts
leave KV behind that later passes overwrite before they read it.

The first pass and a later one are captured as graphs by number of rows, like decode steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from minisgl.core.batch import Chunk
from minisgl.core.executor import Limits
from minisgl.device import Device, Graph
from minisgl.kernels.propose import keep_proposals, prepare_proposals
from minisgl.kernels.sampling import adjust_logits, sample
from minisgl.models.decoder import Decoder
from minisgl.parallel import Communicator
from minisgl.step.inputs import PackedBatch, Sent
from minisgl.step.kv_pool import KVPool, KVShape
from minisgl.step.proposals import FILL, resolve
from minisgl.step.ragged import RAGGED, equal_sequences, ragged_inputs
from minisgl.step.rows import RowBuffers

# Sections whose numbered drafts are replaced by tokens.
RESOLVED = ("decode", "token_ids", "drafts", "point_drafts")
FIRST_WIDTH = 2
GRAPHS_PER_SIZE = 4  # a first pass and a later one, each plain and with penalties


@dataclass(frozen=True)
class Draft:
    """A loaded draft model. Only rank 0 has model and shape; the others know `num_drafts`."""

    model: Decoder | None
    shape: KVShape | None
    num_drafts: int


class DraftRunner:
    """One rank's part: rank 0 has the draft model, the others learn what it proposes."""

    def __init__(
        self,
        device: Device,
        draft: Draft,
        limits: Limits,
        rows: RowBuffers,
        comm: Communicator,
        sizes: Sequence[int],
        *,
        graphs: bool,
    ) -> None:
        """Allocates its pool; in the stream. sizes: numbers of rows, rising. Without `graphs` it
        runs eagerly."""
        self._captures = graphs
        self._device = device
        self._model = draft.model
        self._pool: KVPool | None = None
        if draft.shape is not None:
            self._pool = KVPool(device, draft.shape, limits.num_pages, limits.page_size)
        self._rows = rows
        self._comm = comm
        self._num_drafts = num_drafts = draft.num_drafts
        self._graph = cache(self._captured)
        most = sizes[-1]
        self._sizes = sizes
        self._asked = device.zeros(((1 + num_drafts) * most,), torch.int32)
        self._drafted = device.zeros((most * num_drafts,), torch.int32)
        self._nth = device.zeros((1,), torch.int64)  # of the pass
        self._layouts = {width: equal_sequences(device, most, width) for width in (1, FIRST_WIDTH)}

    def use(self, page: int) -> None:
        """As of `KVPool`."""
        if self._pool is not None:
            self._pool.use(page)

    def copy(self, jobs: torch.Tensor) -> None:
        """The copy jobs of a step."""
        if self._pool is not None:
            self._pool.copy(jobs)

    def capture(self) -> None:
        """Capture every graph, the largest first."""
        if self._model is None or not self._captures:
            return
        for size in reversed(self._sizes):
            asked = self._asked[: (1 + self._num_drafts) * size].view(-1, size)
            asked[0].fill_(self._rows.padding)
            asked[1:].zero_()
            for nth, width in enumerate((FIRST_WIDTH, 1)[: self._num_drafts]):
                self._nth.fill_(nth)
                for adjusts in (False, True):
                    self._graph(size, width, adjusts)

    def run(self, step: PackedBatch, sent: Sent) -> torch.Tensor | None:
        """Compute the step's draft chunks and proposals, and write the proposals into `sent`.

        Returns the proposals [D, K], if there are any.
        """
        if step.batch.draft_chunks and self._model is not None:
            self._fill(step.batch.draft_chunks, sent)
        if "propose" not in sent:
            return None
        size = sent["propose"].numel() // (1 + self._num_drafts)
        if self._model is not None:
            self._asked[: sent["propose"].numel()].copy_(sent["propose"])
            for nth in range(step.num_passes):
                self._nth.fill_(nth)
                width = 1 if nth else FIRST_WIDTH
                if self._captures:
                    self._graph(size, width, step.adjusts).replay()
                else:
                    self._pass(size, width, step.adjusts)
        drafted = self._comm.broadcast(self._drafted_of(size))
        for name in RESOLVED:
            if name in sent:
                resolve(sent[name], drafted)
        return drafted

    def _fill(self, chunks: list[Chunk], sent: Sent) -> None:
        """Compute the KV of the draft chunks."""
        assert self._model is not None
        assert self._pool is not None
        sections = (sent[FILL + name] for name in RAGGED)
        longest = max(chunk.length for chunk in chunks)
        inputs = ragged_inputs(self._rows, self._pool, *sections, max_seqlen_q=longest)
        self._model.forward(inputs)

    def _captured(self, size: int, width: int, adjusts: bool) -> Graph:
        """Once for each: while capturing, or on a device where that costs nothing."""
        return self._device.capture(partial(self._pass, size, width, adjusts))

    def _drafted_of(self, size: int) -> torch.Tensor:
        return self._drafted[: size * self._num_drafts].view(size, self._num_drafts)

    def _pass(self, size: int, width: int, adjusts: bool) -> None:
        """Pass `nth` over `size` rows: the first is of two tokens, later ones are of one.

        The caller sets `nth` before: this cannot count its runs, since capturing runs it once more.
        """
        assert self._model is not None
        assert self._pool is not None
        rows = self._rows
        asked = self._asked[: (1 + self._num_drafts) * size].view(-1, size)
        drafted, own, nth = self._drafted_of(size), asked[0], self._nth
        sequences, offsets = self._layouts[width]
        ids, starts, counts, positions = prepare_proposals(
            asked, drafted, nth, rows.last, rows.previous, rows.lengths, width
        )
        inputs = ragged_inputs(
            rows,
            self._pool,
            ids,
            sequences[: size * width],
            offsets[: size + 1],
            own,
            starts,
            counts,
            num_decode=size,
            decode_width=width,
        )
        hidden = self._model.forward(inputs)
        logits = self._model.logits(hidden.view(size, width, -1)[:, -1])
        if adjusts:
            adjust_logits(
                logits,
                own,
                positions,
                rows.params,
                rows.bias_ids,
                rows.bias_values,
                rows.counts,
                drafted,
            )
        keep_proposals(sample(logits, own, positions, rows.params), drafted, nth)
