"""What a scheduler may choose: who waits how long, and how a step's tokens are divided."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice

import msgspec

from minisgl.config import EngineConfig, SchedulePolicy
from minisgl.core.costmodel import CostModel, Work, decode_work, prefill_work
from minisgl.core.kvcache import KVCache
from minisgl.core.sequence import Sequence
from minisgl.log import get_logger

MATCH_WINDOW = 64  # oldest waiting sequences that `lpm` compares
DECODE_SLOWDOWN = 2.0  # of streams while prompts are computed, if no target says otherwise
FIXED_SHARE = 0.05  # of a step's time, where it can be chosen
UNSEEN = 0.015  # seconds of arithmetic in a step: no reader sees that tokens come so far apart
LEAST_SHARE = 1 / 4  # of the budget, which `decode-first` gives to prompts at least
LEAST_TOKENS = 2  # of prompts in a step: one for a long prompt, one for a short one beside it
ALONE_SLOWDOWN = 1.5  # of a stream, by others beside it: no target keeps it below
SETTLED = 16  # steps measured before a prediction is worth a warning

logger = get_logger(__name__)


class Fairness(msgspec.Struct, frozen=True, kw_only=True):
    """How long a waiting sequence may be passed by others."""

    lpm_ageing: float = 256.0  # cached tokens that one second of waiting is worth under `lpm`
    max_passed: int = 64  # admissions that may pass a sequence that does not fit or ranks low
    max_displaced: int = 6  # preemptions of a sequence until no higher priority takes its place
    headroom: int = 16  # tokens kept available for each running sequence when one is admitted
    scan_limit: int = 32  # waiting sequences tried in a plan that do not fit


FAIR = Fairness()


class WaitingQueue:
    """The waiting sequences, in order of arrival or of priority and arrival.

    A preempted sequence returns to its place. Under `lpm` those of the oldest MATCH_WINDOW with
    the longest cached prefix come first, where each second of waiting counts as `lpm_ageing`
    cached tokens: no sequence is passed for longer than the longest prefix is worth.
    """

    def __init__(self, policy: SchedulePolicy, fairness: Fairness) -> None:
        self.fairness = fairness
        self.policy = policy
        self._sequences: list[Sequence] = []
        self._times_passed: dict[int, int] = {}  # by uid, where it is not 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def urgency(self, sequence: Sequence) -> int:
        """Its request's priority, where that counts."""
        return sequence.request.priority if self.policy == "priority" else 0

    def rank(self, sequence: Sequence) -> float:
        """Lower is served earlier, whoever came first."""
        return -math.inf if sequence.aged else -self.urgency(sequence)

    def key(self, sequence: Sequence) -> tuple[float, int]:
        """Sorts by service order: lower is served earlier, and preempted later."""
        return self.rank(sequence), sequence.uid

    def sort(self) -> None:
        """Ranks have changed."""
        self._sequences.sort(key=self.key)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=self.key)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[bisect_left(self._sequences, self.key(sequence), key=self.key)]
        self._times_passed.pop(sequence.uid, None)

    def times_passed(self, sequence: Sequence) -> int:
        """How many admissions of others have passed it since it began to wait."""
        return self._times_passed.get(sequence.uid, 0)

    def note_passed(self, sequences: list[Sequence]) -> None:
        """Another sequence is admitted before these."""
        for sequence in sequences:
            self._times_passed[sequence.uid] = self.times_passed(sequence) + 1

    def candidates(self, count: int, now: float, cache: KVCache) -> list[Sequence]:
        """The first `count` sequences to try to admit."""
        if self.policy != "lpm":
            return list(islice(self._sequences, count))
        window = list(islice(self._sequences, MATCH_WINDOW))
        score = {
            s.uid: cache.num_matched(s) + self.fairness.lpm_ageing * (now - s.queued_at)
            for s in window
        }
        window.sort(key=lambda s: (-score[s.uid], s.uid))
        return (window + list(islice(self._sequences, MATCH_WINDOW, count)))[:count]


class TokenBudget:
    """How many prompt tokens a step computes beside its decode tokens, which always run.

    `prefill-first` gives prompts the whole budget, `decode-first` what decode leaves of it, but
    LEAST_SHARE at least: with nothing left for prompts, no more streams would run than the budget.
    `balanced` asks the roofline. Decode alone is mostly bound by memory, so prompt tokens up to
    the ridge, where arithmetic takes as long as memory traffic, cost a step next to nothing; far
    beyond it, more of them gain no throughput and delay all streams. It fills a step until its
    arithmetic takes DECODE_SLOWDOWN times what decode alone would take, and until the step's
    fixed time is a small share of it; and in any case for as long as UNSEEN: prompts of a small
    model, whose streams are far faster than anybody reads, would wait for many steps otherwise. An
    inter-token latency target bounds the predicted time, with a margin for how far predictions
    have been off.

    A target does not serialise the server: whatever it is, a step may take ALONE_SLOWDOWN times
    what the longest stream alone would, and computes LEAST_TOKENS of prompts. Where that is above
    the target, the log warns, once.
    """

    def __init__(self, config: EngineConfig, cost_model: CostModel | None) -> None:
        if config.itl_target_ms is not None and cost_model is None:
            raise ValueError("itl_target_ms needs a cost model")
        self._policy = config.batch_policy
        self._size = config.chunked_prefill_size
        self._target = None if config.itl_target_ms is None else config.itl_target_ms / 1e3
        self._model = cost_model
        self._has_warned = False

    def prefill_tokens(self, decode: Work, start: int, longest: int = 0) -> int:
        """The prompt tokens of a step that also computes `decode`, at most the budget.

        start: computed tokens of the first prompt in line; longest: tokens of the longest stream.
        """
        if not decode.num_tokens or self._policy == "prefill-first":
            return self._size
        model = self._model
        if self._policy == "decode-first" or model is None:
            return max(self._size - decode.num_tokens, math.ceil(LEAST_SHARE * self._size))
        alone = model.cost(decode)
        busy = max(alone.compute_seconds, alone.memory_seconds)
        filled = max(DECODE_SLOWDOWN * busy, alone.overhead / FIXED_SHARE, UNSEEN)
        limit = self.limit(max(longest, start))

        def exceeds(count: int) -> bool:
            cost = model.cost(decode + prefill_work(count, start))
            return cost.compute_seconds > filled or cost.seconds > limit

        if not exceeds(self._size):
            return self._size
        # A long prompt's token may cost more than a whole step of short ones.
        least = min(LEAST_TOKENS, self._size)
        return max(bisect_left(range(1, self._size), True, key=exceeds), least)

    def admits(self, num_running: int, context: int, longest: int) -> bool:
        """Whether decode for one more stream would still hold the target.

        context: tokens of all of them together; longest: of the longest that has a right to run.
        """
        if self._target is None or self._model is None or not num_running:
            return True
        return self._model.predict(decode_work(num_running + 1, context)) <= self.limit(longest)

    def limit(self, longest: int) -> float:
        """Seconds that a step may take where the longest stream has `longest` tokens."""
        model, target = self._model, self._target
        if target is None or model is None:
            return math.inf
        alone = model.predict(decode_work(1, longest))
        least = ALONE_SLOWDOWN * alone
        if least > target and model.num_observed >= SETTLED and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"--itl-target-ms {1e3 * target:g} cannot be held: a step of one stream of "
                f"{longest} tokens is predicted to take {1e3 * alone:.3g} ms. So that several "
                f"streams are served at once, steps may take {1e3 * least:.3g} ms."
            )
        return max(target / (1.0 + 3.5 * model.deviation), least)
