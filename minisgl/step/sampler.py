"""From hidden states to tokens, drafts' verdicts and log-probabilities. Runs inside the stream.

Log-probabilities are those of the model itself: of the raw logits, before penalties, biases, masks,
temperature and filters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch

from minisgl.core.executor import GrammarMasks
from minisgl.core.request import TokenLogprobs
from minisgl.device import Device
from minisgl.kernels.advance import accept_and_advance
from minisgl.kernels.logprobs import logprobs
from minisgl.kernels.sampling import adjust_logits, mask_logits, sample
from minisgl.parallel import Communicator
from minisgl.step.inputs import LogprobRequest, PackedBatch, Sent, pack_masks
from minisgl.step.rows import RowBuffers

BLOCK_BYTES = 64 * 2**20  # logits held at once for prompt log-probabilities


class Logprobs:
    """Log-probabilities at P positions, on the host once the step's event has passed."""

    def __init__(
        self, device: Device, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
    ) -> None:
        """Log-softmax of logits [P, V] at the tokens [P], and its `num_top` largest."""
        found = logprobs(logits, token_ids, min(num_top, logits.shape[1]))
        self._columns = [device.download(column) for column in (token_ids, *found)]

    def read(self, span: slice, num_top: int) -> list[TokenLogprobs]:
        """The entries of the positions of `span`, with `num_top` alternatives each."""
        token_ids, chosen, top_ids, top = (column[span] for column in self._columns)
        columns = token_ids, chosen, top_ids[:, :num_top], top[:, :num_top]
        entries = zip(*(column.tolist() for column in columns), strict=True)
        return [TokenLogprobs(*entry) for entry in entries]


@dataclass
class Sampled:
    """What a step sampled, on the host once its event has passed."""

    # [N] int32 tokens and, in a step with drafts, how many each of M sequences accepted, [M].
    drawn: torch.Tensor | None = None
    logprobs: Logprobs | None = None  # at the points of the step's requests, one after another
    prompt_logprobs: list[list[Logprobs]] = field(default_factory=list)  # blocks, by request


class Shaping(Enum):
    """What happens to logits before the draw; each does what those before it do.

    Decode graphs have one sampling half for each: the first costs nothing where nothing is asked.
    """

    PLAIN = 0
    ADJUSTED = 1  # penalties, biases and bans
    MASKED = 2  # grammar masks


@dataclass(frozen=True)
class Points:
    """Where a step samples: N points of M sequences, each one's 1 + drafts points together."""

    tokens: torch.Tensor | None  # [N padded] int32, those of the step's tokens; None = all of them
    ids: torch.Tensor  # [N] int32, their ids
    rows: torch.Tensor  # [N] int32
    positions: torch.Tensor  # [N] int64, behind the points: where the new tokens will stand
    first: torch.Tensor  # [M] int32, where each sequence's points begin
    sequence_rows: torch.Tensor  # [M] int32
    drafts: torch.Tensor  # [M, K] int32, PENDING after a sequence's own
    before: torch.Tensor  # [N, K] int32, the drafts before each point

    @classmethod
    def of(
        cls, step: PackedBatch, sent: Sent, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> "Points":
        """Those of a ragged step with tokens `input_ids` at `positions` [T]."""
        points, count, k = sent["points"], len(step.sampling), step.max_drafts
        none, own = points.new_empty((0,)), points[: step.num_points]
        return cls(
            tokens=points,
            ids=input_ids.index_select(0, own),
            rows=sent["point_rows"],
            positions=positions.index_select(0, own) + 1,
            first=sent["first"],
            sequence_rows=sent["sampled_rows"],
            drafts=sent.get("drafts", none).view(count, k),
            before=sent.get("point_drafts", none).view(step.num_points, k),
        )


@dataclass(frozen=True)
class Masks:
    """Grammar masks on the device, as `mask_logits` takes them."""

    indices: torch.Tensor  # [M] int32, points; -1 = none
    bits: torch.Tensor  # [M, ceil(V / 32)] int32


class Sampler:
    """Samples the points of a step. `logits` maps hidden [N, H] to [N, V] fp32.

    Rank 0 draws; the other ranks take part in the logits, learn the tokens and move on as it does.
    """

    def __init__(
        self,
        device: Device,
        logits: Callable[[torch.Tensor], torch.Tensor],
        rows: RowBuffers,
        comm: Communicator,
        *,
        keeps_previous: bool = False,
    ) -> None:
        """keeps_previous: whether rows keep the token before their last one."""
        self._keeps_previous = keeps_previous
        self.draws = comm.rank == 0
        self._comm = comm
        self._device = device
        self._logits = logits
        self._rows = rows

    def __call__(
        self,
        step: PackedBatch,
        sent: Sent,
        hidden: torch.Tensor,
        points: Points | None,
        masks: GrammarMasks | None,
    ) -> Sampled:
        """hidden: [T, H]; points: None for no points."""
        device, sampled = self._device, Sampled()
        first = 0
        for request in step.prompt_logprobs:
            targets = sent["targets"][first : first + request.count]
            first += request.count
            sampled.prompt_logprobs.append(self._prompt_logprobs(request, targets, hidden))
        if points is None:
            return sampled
        shaping = Shaping.ADJUSTED if step.adjusts else Shaping.PLAIN
        on_device = None
        if masks is not None and masks.indices:
            shaping = Shaping.MASKED
            words = masks.bits.shape[1]
            packed = device.upload(pack_masks(step, masks, len(masks.indices)))
            index, bits = packed.tensor_split((len(masks.indices),))
            on_device = Masks(index, bits.view(-1, words))
        asked = sent.get("asked")
        tokens, accepted, raw = self.draw(hidden, points, shaping, on_device, asked)
        if not self.draws:
            return sampled
        drawn = torch.cat([tokens, accepted]) if step.max_drafts else tokens
        sampled.drawn = device.download(drawn)
        if raw is not None and asked is not None:
            most = max(request.num_top for request in step.logprobs)
            sampled.logprobs = Logprobs(device, raw, tokens.index_select(0, asked), most)
        return sampled

    def draw(
        self,
        hidden: torch.Tensor,
        points: Points,
        shaping: Shaping,
        masks: Masks | None = None,
        asked: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens [N] int32, drafts accepted [M] int32, and the raw logits of the points `asked`.

        Moves the rows on. Reads nothing on the host: a decode graph captures it.
        """
        rows, count = self._rows, len(points.rows)
        if points.tokens is not None:
            hidden = hidden.index_select(0, points.tokens)
        logits = self._logits(hidden)[:count]
        raw = None
        if self.draws:
            raw = None if asked is None else logits.index_select(0, asked)
            tokens = self._choose(logits, points, shaping, masks)
        else:
            tokens = points.rows.new_empty(count)
        tokens = self._comm.broadcast(tokens)
        accepted = accept_and_advance(
            tokens,
            points.first,
            points.sequence_rows,
            points.drafts,
            points.positions,
            rows.last,
            rows.lengths,
            rows.counts,
            rows.counted,
            points.ids if self._keeps_previous else None,
            rows.previous if self._keeps_previous else None,
        )
        return tokens, accepted, raw

    def _choose(
        self,
        logits: torch.Tensor,
        points: Points,
        shaping: Shaping,
        masks: Masks | None,
    ) -> torch.Tensor:
        """Tokens [N] int32 of logits [N, V], which are adjusted in place."""
        rows = self._rows
        if shaping is not Shaping.PLAIN:
            adjust_logits(
                logits,
                points.rows,
                points.positions,
                rows.params,
                rows.bias_ids,
                rows.bias_values,
                rows.counts,
                points.before,
            )
        if shaping is Shaping.MASKED:
            assert masks is not None
            mask_logits(logits, masks.indices, masks.bits)
        tokens: torch.Tensor = sample(logits, points.rows, points.positions, rows.params)
        return tokens

    def _prompt_logprobs(
        self, request: LogprobRequest, targets: torch.Tensor, hidden: torch.Tensor
    ) -> list[Logprobs]:
        """In blocks: the logits of a whole prompt are never held at once."""
        block = scored_at_once(self._rows.counts.shape[1])
        blocks = []
        for start in range(0, request.count, block):
            stop = min(start + block, request.count)
            logits = self._logits(hidden[request.first + start : request.first + stop])
            if self.draws:
                scored = Logprobs(self._device, logits, targets[start:stop], request.num_top)
                blocks.append(scored)
        return blocks


def scored_at_once(vocab: int) -> int:
    """Positions of a prompt whose logits are held at once for log-probabilities, at most."""
    return max(1, BLOCK_BYTES // (vocab * 4))
