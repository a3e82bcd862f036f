"""Speculation for the scheduler: asks for drafts, and keeps the draft model's KV complete.

A proposer names tokens that may follow; one step of the target verifies them all, and keeps those
that it would have sampled itself (Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023, with noise shared instead of rejection). With each draft accepted with
probability p, k drafts give 1 + p + ... + p^k tokens a step.

A draft model keeps KV of its own, on the target's pages. What it has not computed of a sequence,
because nothing was drafted meanwhile or a cached prefix came without, is counted and caught up by
draft chunks before it proposes again.
"""

from collections.abc import Callable

from minisgl.core.batch import PENDING, Batch, Chunk, StepOutput
from minisgl.core.draft_policy import DraftPolicy
from minisgl.core.ngram import NGramProposer
from minisgl.core.sequence import Sequence

NONE: list[int] = []  # shared by all chunks without ids, pages or drafts; never changed

# Names up to so many tokens that may follow those a sequence holds and has pending.
Proposer = Callable[[Sequence, int], list[int]]


def propose_on_device(sequence: Sequence, count: int) -> list[int]:
    """The proposer of a draft model: what it proposes is known on the device."""
    return [PENDING] * count


class Speculation:
    """Asks `proposer` for up to `num_draft_tokens` drafts for each sequence in each step.

    With 0 nothing is drafted. `on_device` is a draft model: at most `chunk_size` tokens a step are
    computed by it beside the proposals. `policy` says how many drafts pay; without one, all are
    asked for.
    """

    def __init__(
        self,
        proposer: Proposer,
        num_draft_tokens: int,
        *,
        on_device: bool = False,
        policy: DraftPolicy | None = None,
        chunk_size: int = 2048,
    ) -> None:
        self.on_device = on_device
        self.policy = policy
        self.follows = True  # whether prompts go through the draft model too
        self.num_drafts = 0  # verified
        self.num_tried = 0  # of those: up to the first of a step that was wrong
        self.num_accepted = 0
        self._proposer = proposer
        self._ngram = proposer if isinstance(proposer, NGramProposer) else None
        self._most = num_draft_tokens
        self._chunk_size = chunk_size
        # What the draft model computes in this plan before it proposes.
        self.catching_up: list[tuple[Sequence, Chunk]] = []
        self._left = 0  # tokens that may still be caught up in this plan
        self._holds_back = False  # drafts, until there is a step by which they can be judged

    @property
    def gain(self) -> float:
        """Tokens per second against those without drafts, as measured at the present load."""
        return self.policy.load.gain if self.policy and self.policy.load.pays else 1.0

    def begin(self, num_sequences: int, prefills: bool) -> bool:
        """A plan begins; whether its `num_sequences` decoding sequences may have drafts.

        prefills: whether it may compute prompts beside them.
        """
        if self._ngram is not None:
            self._ngram.begin()
        # A step that holds drafts back leaves the draft model one token behind in every sequence.
        ready = self.follows and all(chunk.length == 1 for _, chunk in self.catching_up)
        self.catching_up, self._left = [], self._chunk_size
        if self.policy is None:
            return self._most > 0
        may_draft = self.policy.begin(num_sequences, prefills)
        load = self.policy.load
        self.follows = may_draft
        self._holds_back = not load.pays and (prefills or not ready)
        if load.wait:  # a trial that will most likely fail again
            self._left //= 4
        return may_draft

    def propose(self, seq: Sequence, most: int) -> list[int]:
        """Up to `most` drafts for a decoding sequence."""
        count = min(self.policy.count(seq) if self.policy else self._most, most)
        if count <= 0:
            return NONE
        if self.on_device and not self._catch_up(seq, seq.num_computed - 1):
            return NONE
        if self._holds_back:
            return NONE
        return self._proposer(seq, count)

    def follow(self, seq: Sequence, stop: int) -> None:
        """The target computes a sequence's prompt up to `stop`: so does what proposes."""
        if self.on_device and self.follows:
            self._catch_up(seq, stop)
        if self._ngram is not None and self.follows:
            self._ngram.follow(seq)

    def planned(self, seq: Sequence, start: int) -> None:
        """Drafts of a sequence, after its tokens [0, start], are in the plan."""
        seq.kv.num_drafted = start

    def take(self, seq: Sequence, num_drafts: int, num_accepted: int) -> None:
        """Drafts of a sequence have been verified."""
        if self.on_device:
            # The token after the last accepted one is the next proposal's to compute.
            seq.kv.num_drafted += num_accepted
        self.num_drafts += num_drafts
        self.num_accepted += num_accepted
        tried = num_accepted + (num_accepted < num_drafts)
        self.num_tried += tried
        if self.policy is not None:
            self.policy.take(seq, tried, num_accepted)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a step's measured time and its results."""
        if self.policy is not None:
            self.policy.observe(batch, output)

    def _catch_up(self, seq: Sequence, stop: int) -> bool:
        """Let the draft model compute a sequence's tokens up to `stop`; False: not all yet."""
        start = seq.kv.num_drafted
        if start >= stop:
            return True
        count = min(stop - start, self._left)
        if count > 0:
            ids = seq.token_ids(start, start + count)
            chunk = Chunk(seq.uid, seq.epoch, seq.row, start, count, ids, 0, NONE, False)
            self.catching_up.append((seq, chunk))
            self._left -= count
            seq.kv.num_drafted = start + count
        return seq.kv.num_drafted == stop
