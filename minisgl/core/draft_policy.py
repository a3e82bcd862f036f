"""How many drafts pay: by the number of decoding sequences, and by sequence.

Drafting costs a wider step and brings tokens. Both are measured in steps that only decode. A number
of decoding sequences (a power of two) is first tried with drafts, then drafts are kept while they
gain, and tried again after a while where they did not.
"""

from collections import defaultdict
from weakref import WeakKeyDictionary

from minisgl.core.batch import Batch, StepOutput
from minisgl.core.sequence import Sequence

RATE = 0.1  # of moving averages
WORTH = 1.05  # the gain asked for: planning and packing drafts are not in a step's time
TRIAL = 8  # measured steps with drafts after which they are judged
RETRY = 128  # steps until drafts are tried again; doubles, up to 64 times as many


class Average:
    """A moving average that starts as a mean; a single stray value counts three times at most."""

    def __init__(self, rate: float = RATE) -> None:
        self.value = 0.0
        self.count = 0
        self._rate = rate

    def add(self, value: float) -> None:
        self.count += 1
        if self.count > 3:
            value = min(value, 3.0 * self.value)
        self.value += max(self._rate, 1.0 / self.count) * (value - self.value)


class Load:
    """What drafts cost and bring at one number of decoding sequences."""

    def __init__(self) -> None:
        self.plain = Average()  # seconds of a step without drafts
        self.pays = False  # as judged last
        self.wait = 0  # steps from a judgement that drafts do not pay to the next trial
        self._steps = 0  # since then, or since a step without drafts was measured
        self._begin_trial()

    def _begin_trial(self) -> None:
        self.slowdown = Average()  # of a step with drafts, against one without
        self.tokens = Average(RATE / 4)  # of a sequence in it: it varies from step to step
        self.drafts = Average()  # the most of a sequence in it
        self._num_missed = 0

    @property
    def is_measured(self) -> bool:
        return self.drafts.count >= TRIAL

    @property
    def gain(self) -> float:
        """Tokens per second with drafts, against those without."""
        return self.tokens.value / self.slowdown.value if self.drafts.count else 1.0

    @property
    def cost(self) -> float:
        """What one more draft for every sequence adds to a step, as a share of a plain one."""
        if not self.is_measured:
            return 0.0
        return max(self.slowdown.value - 1.0, 0.0) / self.drafts.value

    def may_draft(self, prefills: bool) -> bool:
        """A step begins: whether it may have drafts. `prefills`: it may compute prompts too."""
        self._steps += 1
        if self.plain.count < 2:
            return False
        if self.pays:  # now and then a step without drafts, if it can be measured
            return prefills or self._steps < RETRY
        if self._steps == self.wait:
            self._begin_trial()
        return self._steps >= self.wait

    def observe(self, seconds: float, num_drafts: int, tokens: float) -> None:
        """A step that only decoded, with `num_drafts` for a sequence at most."""
        if not num_drafts:
            self.plain.add(seconds)
            if self.pays:
                self._steps = 0
        elif self.plain.count:
            self.slowdown.add(seconds / self.plain.value)
            self.tokens.add(tokens)
            self.drafts.add(num_drafts)
            # If not even acceptance of every draft were worth it, two steps are enough.
            most = (1.0 + self.drafts.value) / self.slowdown.value
            if self.is_measured or (self.drafts.count > 1 and most < WORTH):
                self._judge(self.gain >= WORTH)

    def miss(self) -> None:
        """A step prepared for drafts without having any: its time does not show what they cost."""
        self._num_missed += 1
        if not self.pays and self._num_missed >= 4 * TRIAL:
            self._judge(False)

    def _judge(self, pays: bool) -> None:
        if pays:
            self.wait = 0
        else:
            self.wait = min(max(2 * self.wait, RETRY), 64 * RETRY)
            self._steps = 0
        self.pays = pays


class DraftPolicy:
    """Gives sequences as many drafts as pay, at most `most`.

    any_width: a step with fewer drafts is cheaper; else, by CUDA graphs, all steps with drafts are
    equally wide.
    """

    def __init__(self, most: int, *, any_width: bool = True) -> None:
        self.load = Load()  # the present one
        self._most = most
        self._any_width = any_width
        self._loads: defaultdict[int, Load] = defaultdict(Load)
        self._acceptance: WeakKeyDictionary[Sequence, float] = WeakKeyDictionary()
        self._common_acceptance = 0.75  # what new sequences begin with

    def begin(self, num_sequences: int, prefills: bool) -> bool:
        """A plan begins; whether its `num_sequences` decoding sequences may have drafts."""
        self.load = self._loads[num_sequences.bit_length()]
        return self.load.may_draft(prefills)

    def count(self, seq: Sequence) -> int:
        """The drafts that give a sequence the most tokens per second; at least 1, to learn more."""
        load, most = self.load, self._most
        if self._any_width:
            # The cost of many drafts does not follow from that of one, and measuring many at once
            # can itself slow the server: ask for twice as many as have been measured.
            known = 2.0 * load.drafts.value if load.is_measured else 1.0
            most = min(most, max(1, round(known)))
        p = self._acceptance.get(seq, self._common_acceptance)
        best, count, tokens, reached = 0.0, 1, 1.0, 1.0
        for k in range(1, most + 1):
            reached *= p
            tokens += reached
            if tokens / (1.0 + load.cost * k) > best:
                best, count = tokens / (1.0 + load.cost * k), k
        return count

    def take(self, seq: Sequence, num_tried: int, num_accepted: int) -> None:
        """Of a sequence's drafts, `num_tried` were looked at: up to the first that was wrong."""
        known, share = self._acceptance.get(seq, self._common_acceptance), num_accepted / num_tried
        rate = RATE * num_tried / self._most
        self._acceptance[seq] = known + rate * (share - known)
        self._common_acceptance += RATE * rate * (share - self._common_acceptance)

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
            load.observe(output.seconds, num_drafts, sum(map(len, output.token_ids)) / count)
