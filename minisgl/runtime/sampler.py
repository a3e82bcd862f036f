"""From hidden states to tokens, drafts' verdicts and log-probabilities. Runs inside the stream.

Log-probabilities are those of the model itself: of the raw logits, before penalties, biases, masks,
temperature and filters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from minisgl.core.executor import GrammarMasks
from minisgl.core.request import TokenLogprobs
from minisgl.device import Device
from minisgl.kernels.advance import advance_rows
from minisgl.kernels.sampling import adjust_logits, mask_logits, sample
from minisgl.parallel import Communicator
from minisgl.runtime.inputs import LogprobRequest, StepArrays
from minisgl.runtime.rows import RowBuffers

BLOCK_BYTES = 64 * 2**20  # logits held at once for prompt log-probabilities
Sent = dict[str, torch.Tensor]


@dataclass
class Logprobs:
    """Log-probabilities at P positions, on the host once the step's event has passed."""

    token_ids: torch.Tensor  # [P] int
    logprobs: torch.Tensor  # [P] fp32
    top_ids: torch.Tensor  # [P, n] int
    top_logprobs: torch.Tensor  # [P, n] fp32

    def read(self, first: int, count: int, num_top: int) -> list[TokenLogprobs]:
        """The entries of `count` positions, with `num_top` alternatives each."""
        span = slice(first, first + count)
        columns = (
            self.token_ids[span].tolist(),
            self.logprobs[span].tolist(),
            self.top_ids[span, :num_top].tolist(),
            self.top_logprobs[span, :num_top].tolist(),
        )
        return [TokenLogprobs(*entry) for entry in zip(*columns, strict=True)]


@dataclass
class Sampled:
    """What a step sampled, on the host once its event has passed."""

    tokens: torch.Tensor | None = None  # [N] int32
    accepted: torch.Tensor | None = None  # [M] int32, drafts accepted; None without drafts
    logprobs: Logprobs | None = None  # at the points of the step's requests, one after another
    prompt_logprobs: list[list[Logprobs]] = field(default_factory=list)  # blocks, by request


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
    ) -> None:
        self._comm = comm
        self._device = device
        self._logits = logits
        self._rows = rows

    def __call__(
        self,
        step: StepArrays,
        sent: Sent,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        masks: GrammarMasks | None,
    ) -> Sampled:
        """hidden: [T, H]; positions: [T] int64 of the step's tokens."""
        sampled = Sampled()
        for request in step.prompt_logprobs:
            sampled.prompt_logprobs.append(self._prompt_logprobs(request, hidden))
        if step.num_points:
            self._sample(step, sent, hidden, positions, masks, sampled)
        return sampled

    def _sample(
        self,
        step: StepArrays,
        sent: Sent,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        masks: GrammarMasks | None,
        sampled: Sampled,
    ) -> None:
        rows, device = self._rows, self._device
        points = sent["points"]
        n = step.num_points
        logits = self._logits(hidden.index_select(0, points))[:n]
        positions = positions.index_select(0, points[:n]) + 1  # where the new tokens will stand
        if self._comm.rank == 0:
            tokens = self._draw(step, sent, logits, positions, masks, sampled)
        else:
            tokens = points.new_empty(n)
        tokens = self._comm.broadcast(tokens)
        drafts = _matrix(sent.get("drafts"), len(step.sampling), step.max_drafts, points)
        accepted = advance_rows(
            tokens,
            sent["first"],
            sent["sampled_rows"],
            drafts,
            positions,
            rows.last,
            rows.lengths,
            rows.counts,
            rows.counted,
        )
        if self._comm.rank == 0:
            sampled.tokens = device.download(tokens)
            if step.max_drafts:
                sampled.accepted = device.download(accepted)

    def _draw(
        self,
        step: StepArrays,
        sent: Sent,
        logits: torch.Tensor,
        positions: torch.Tensor,
        masks: GrammarMasks | None,
        sampled: Sampled,
    ) -> torch.Tensor:
        """Tokens [N] int32 of logits [N, V], which are adjusted in place."""
        rows, device = self._rows, self._device
        point_rows = sent["point_rows"]
        raw = asked = None
        if step.logprobs:
            asked = device.upload(_point_index(step.logprobs))
            raw = logits.index_select(0, asked)
        if step.adjusts:
            drafts = sent.get("point_drafts")
            adjust_logits(
                logits,
                point_rows,
                positions,
                rows.params,
                rows.bias_ids,
                rows.bias_values,
                rows.counts,
                _matrix(drafts, step.num_points, step.max_drafts, point_rows),
            )
        if masks is not None and masks.indices:
            bits = np.ascontiguousarray(masks.bits).view(np.int32)
            mask_logits(logits, device.upload(_mask_index(step, masks)), device.upload(bits))
        tokens: torch.Tensor = sample(logits, point_rows, positions, rows.params)
        if raw is not None and asked is not None:
            most = max(request.num_top for request in step.logprobs)
            sampled.logprobs = self._score(raw, tokens.index_select(0, asked), most)
        return tokens

    def _score(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
        """Log-softmax of logits [P, V] at the tokens, and its largest; not computed elsewhere."""
        total = logits.logsumexp(dim=1)
        chosen = logits.gather(1, token_ids.long()[:, None]).squeeze(1) - total
        top = logits.topk(min(num_top, logits.shape[1]), dim=1)
        download = self._device.download
        return Logprobs(
            token_ids=download(token_ids),
            logprobs=download(chosen),
            top_ids=download(top.indices),
            top_logprobs=download(top.values - total[:, None]),
        )

    def _prompt_logprobs(self, request: LogprobRequest, hidden: torch.Tensor) -> list[Logprobs]:
        """In blocks: the logits of a whole prompt are never held at once."""
        assert request.targets is not None
        targets = self._device.upload(request.targets)
        vocab = self._rows.counts.shape[1]
        block = max(1, BLOCK_BYTES // (vocab * 4))
        blocks = []
        for start in range(0, request.count, block):
            stop = min(start + block, request.count)
            logits = self._logits(hidden[request.first + start : request.first + stop])
            if self._comm.rank == 0:
                blocks.append(self._score(logits, targets[start:stop], request.num_top))
        return blocks


def _matrix(flat: torch.Tensor | None, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((rows, 0)) if flat is None else flat.view(rows, columns)


def _point_index(requests: list[LogprobRequest]) -> np.ndarray:
    spans = [np.arange(r.first, r.first + r.count, dtype=np.int32) for r in requests]
    return np.concatenate(spans)


def _mask_index(step: StepArrays, masks: GrammarMasks) -> np.ndarray:
    """The point of each mask: a chunk's masks are for its points, in order."""
    next_point = dict(zip(step.sampling, step.first_points, strict=True))
    index = np.empty(len(masks.indices), np.int32)
    for i, chunk in enumerate(masks.indices):
        index[i] = next_point[chunk]
        next_point[chunk] += 1
    return index
