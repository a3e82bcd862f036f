"""Speculation as the scheduler sees it: how many drafts each sequence gets, and whether it pays.

A proposer names tokens that may follow; one step of the target verifies them all, and keeps those
that it would have sampled itself (Leviathan et al., "Fast Inference from Transformers via
Speculative Decoding", 2023, with noise shared instead of rejection). With each draft accepted with
probability p, k drafts give 1 + p + ... + p^k tokens a step.

A draft model keeps KV of its own, on the target's pages. What it has not computed of a sequence,
because nothing was drafted meanwhile or a cached prefix came without, is counted and caught up by
draft chunks before it proposes again.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

from minisgl.core.batch import PENDING, Batch, Chunk, StepOutput
from minisgl.core.sequence import Sequence

NONE: list[int] = []

# Names up to so many tokens that may follow those a sequence holds and has pending.
Proposer = Callable[[Sequence, int], list[int]]

RATE = 0.1  # of moving averages
TOKEN_RATE = 1 / 64  # of that of tokens: one sequence's luck is another number in every step
FEW = 4  # measured steps with drafts from which on they are judged
FEW_TOKENS = 24  # and so many sequences in them together
WORTH = 1.05  # the gain asked for: planning and packing drafts are not in a step's time
HOPELESS = 1.25  # the gain, were every draft accepted, that is judged at once
REFRESH = 256  # steps after which a plain one is measured again
RETRY_STEPS = 128  # after which drafting is tried anew where it did not pay; doubles
RETRY_STEPS_MOST = 8192
RETRY_TOKENS = 512  # that the draft model catches up with in a step then
TRIAL_MISSES = 32  # steps that only get ready for it, after which a trial is given up
SECOND_CHANCE = 32  # plans after which a sequence without luck gets a draft again
PRIOR = 4.0  # drafts that the common acceptance counts for in a sequence's own
FORGETTING = 0.97  # of a sequence's drafts, per step


def propose_on_device(sequence: Sequence, count: int) -> list[int]:
    """The proposer of a draft model: what it proposes is known on the device."""
    return [PENDING] * count


class _Load:
    """What drafting costs and gains at one number of decoding sequences (a power of two).

    First it is tried, then judged. Where it does not pay it is tried again, ever less often.
    """

    def __init__(self) -> None:
        self.plain = 0.0  # seconds of a step without drafts
        self.pays = False  # as measured
        self._num_plain = 0
        self._turns = 0  # steps since it was judged, or a plain step was measured on purpose
        self._rest = 0  # steps between two trials
        self._forget()

    def _forget(self) -> None:
        self.slowdown = 1.0  # of a step with drafts, against a plain one
        self.tokens = 1.0  # that a sequence gets from it
        self.drafts = 0.0  # the most of a sequence in it
        self._num_drafted = 0
        self._num_missed = 0

    @property
    def gain(self) -> float:
        """Tokens per second with drafts, against those without."""
        return self.tokens / self.slowdown

    @property
    def cost(self) -> float:
        """What one more draft for every sequence adds to a step, as a share of a plain one."""
        if not self.is_measured:
            return 0.0
        return max(self.slowdown - 1.0, 0.0) / self.drafts

    @property
    def is_measured(self) -> bool:
        """Whether it is known what drafts cost."""
        return self._num_drafted >= FEW

    @property
    def is_retried(self) -> bool:
        """Whether steps with drafts would be a trial after one that failed."""
        return not self.pays and self._rest > 0

    def turn(self, prefills: bool) -> bool:
        """A step begins: whether it may draft. One with prompts in it is not measured."""
        self._turns += 1
        if self._num_plain < 2:
            return False
        if self.pays:
            return prefills or self._turns < REFRESH
        if self._turns == self._rest:
            self._forget()
        return self._turns >= self._rest

    def observe(self, seconds: float, count: int, num_drafts: int, tokens: float) -> None:
        """A step of `count` sequences decoding, of so many drafts at most and tokens on average."""
        if not num_drafts:
            self._num_plain += 1
            self.plain = _average(self.plain, seconds, self._num_plain)
            if self.pays:
                self._turns %= REFRESH
            return
        if not self.plain:
            return
        self._num_drafted += 1
        n = self._num_drafted
        self.slowdown = _average(self.slowdown, seconds / self.plain, n)
        self.drafts = _average(self.drafts, num_drafts, n)
        self.tokens = _average(self.tokens, tokens, n, min(RATE, TOKEN_RATE * count))
        hopeless = n > 1 and (1.0 + self.drafts) / self.slowdown < HOPELESS
        if hopeless or (n >= FEW and n * count >= FEW_TOKENS):
            self.judge(self.gain >= WORTH)

    def miss(self) -> None:
        """A step got ready to draft, which tells nothing of what that costs."""
        self._num_missed += 1
        if not self.pays and self._num_missed >= TRIAL_MISSES:
            self._forget()
            self.judge(False)

    def judge(self, pays: bool) -> None:
        """Measured: whether to draft at this load. A refusal holds the longer the more follow."""
        if pays or self.pays:
            self._rest = RETRY_STEPS
        else:
            self._rest = min(max(2 * self._rest, RETRY_STEPS), RETRY_STEPS_MOST)
        if not (pays and self.pays):
            self._turns = 0
        self.pays = pays


def _average(before: float, value: float, count: int, rate: float = RATE) -> float:
    """A moving average that starts as a mean; a single stray value counts three times at most."""
    if count > 3:
        value = min(value, 3.0 * before)
    return before + max(rate, 1.0 / count) * (value - before)


class Speculation:
    """Asks `proposer` for up to `num_draft_tokens` drafts for each sequence in each step.

    `on_device` is a draft model: at most `chunk_size` tokens a step are computed by it beside the
    proposals. With `adaptive`, a sequence gets as many drafts as pay by its measured acceptance,
    and none do where steps of that many sequences are measured to gain nothing. `any_width`: fewer
    drafts make a cheaper step; else, by CUDA graphs, all steps with drafts are equally wide.
    """

    def __init__(
        self,
        proposer: Proposer,
        num_draft_tokens: int,
        *,
        on_device: bool = False,
        adaptive: bool = True,
        any_width: bool = True,
        chunk_size: int = 2048,
    ) -> None:
        self.on_device = on_device
        self.num_drafts = 0  # verified
        self.num_tried = 0  # of those: up to the first of a step that was wrong
        self.num_accepted = 0
        self._proposer = proposer
        self._most = num_draft_tokens
        self._adaptive = adaptive
        self._any_width = any_width
        self._chunk_size = chunk_size
        self._loads: dict[int, _Load] = {}
        self._load = _Load()
        self._acceptance = 0.75  # of all sequences, until measured
        # Drafts tried and accepted of late, up to the first that was wrong.
        self._luck: WeakKeyDictionary[Sequence, tuple[float, float]] = WeakKeyDictionary()
        self._turns = 0
        self._retries = False  # whether this step is one to try sequences without luck again
        self._chunks: list[tuple[Sequence, Chunk]] = []
        self._left = 0  # tokens that may still be caught up in this plan
        self._follows = True  # whether prompts go through the draft model too
        self._waits = False  # with drafts, for a step that they can be judged by

    @property
    def gain(self) -> float:
        """Tokens per second against those without drafts, as measured at the present load."""
        return self._load.gain if self._load.pays else 1.0

    def begin(self, num_sequences: int, prefills: bool) -> bool:
        """A plan begins; whether its `num_sequences` decoding sequences may have drafts.

        prefills: whether it may compute prompts beside them.
        """
        # A step that waits leaves a hole of one token for every sequence.
        ready = self._follows and all(chunk.length == 1 for _, chunk in self._chunks)
        self._chunks, self._left = [], self._chunk_size
        if not self._adaptive:
            return True
        bucket = num_sequences.bit_length()
        if bucket not in self._loads:
            self._loads[bucket] = _Load()
        load = self._load = self._loads[bucket]
        may = load.turn(prefills)
        if may and load.pays and not self._best_count(self._acceptance):
            load.judge(False)
            may = False
        self._retries = self._turns % SECOND_CHANCE == 0
        self._turns += 1
        self._follows = may
        self._waits = not load.pays and (prefills or not ready)
        if load.is_retried:  # for what will most likely be given up again
            self._left = min(self._left, RETRY_TOKENS)
        return may

    def propose(self, seq: Sequence, most: int) -> list[int]:
        """Up to `most` drafts for a decoding sequence."""
        count = min(self._count(seq) if self._adaptive else self._most, most)
        if count <= 0:
            return NONE
        if self.on_device and not self._catch_up(seq, seq.num_computed - 1):
            return NONE
        if self._waits:
            return NONE
        return self._proposer(seq, count)

    def follow(self, seq: Sequence, stop: int) -> None:
        """The target computes a sequence's prompt up to `stop`: so does the draft model."""
        if self.on_device and self._follows:
            self._catch_up(seq, stop)

    def finish(self) -> list[tuple[Sequence, Chunk]]:
        """A plan is complete: what the draft model computes before it proposes."""
        return self._chunks

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
        before = self._luck.get(seq, (0.0, 0.0))
        self._luck[seq] = FORGETTING * before[0] + tried, FORGETTING * before[1] + num_accepted
        self._acceptance += 0.01 * tried * (num_accepted / tried - self._acceptance)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a step's measured time, if it did nothing but decode."""
        count = batch.num_decode
        load = self._loads.get(count.bit_length())
        if load is None or output.seconds <= 0.0:
            return
        num_drafts = max(len(chunk.drafts) for chunk in batch.chunks)
        caught_up = batch.draft_chunks
        if caught_up and (not num_drafts or any(chunk.length > 1 for chunk in caught_up)):
            load.miss()
        elif count == len(batch.chunks):
            load.observe(output.seconds, count, num_drafts, sum(map(len, output.token_ids)) / count)

    def _count(self, seq: Sequence) -> int:
        """A sequence's number of drafts by its acceptance, of which all tell something."""
        tried, accepted = self._luck.get(seq, (0.0, 0.0))
        count = self._best_count((accepted + PRIOR * self._acceptance) / (tried + PRIOR))
        return max(count, int(self._retries))

    def _best_count(self, p: float) -> int:
        """The number of drafts with the most tokens per second, at acceptance `p`."""
        cost = self._load.cost
        best, count, tokens, reached = WORTH, 0, 1.0, 1.0
        most = self._most
        if self._any_width:
            # What many cost is not foretold by what one does: to find out with many at once would
            # be what slows the server.
            known = 2.0 * self._load.drafts if self._load.is_measured else 1.0
            most = min(most, max(1, round(known)))
        for k in range(1, most + 1):
            reached *= p
            tokens += reached
            if tokens / (1.0 + cost * k) > best:
                best, count = tokens / (1.0 + cost * k), k
        return count

    def _catch_up(self, seq: Sequence, stop: int) -> bool:
        """Let the draft model compute a sequence's tokens up to `stop`; False: not all yet."""
        start = seq.kv.num_drafted
        if start >= stop:
            return True
        count = min(stop - start, self._left)
        if count > 0:
            ids = seq.token_ids(start, start + count)
            chunk = Chunk(seq.uid, seq.epoch, seq.row, start, count, ids, 0, NONE, False)
            self._chunks.append((seq, chunk))
            self._left -= count
            seq.kv.num_drafted = start + count
        return seq.kv.num_drafted == stop
