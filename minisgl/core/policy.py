"""What a scheduler may choose: who waits how long, and how a step's tokens are divided."""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import islice

import msgspec

from minisgl.config import EngineConfig, SchedulePolicy
from minisgl.core.costmodel import CostModel, Work, decode_work, prefill_work
from minisgl.core.kvcache import KVCache
from minisgl.core.sequence import Sequence

MATCH_WINDOW = 64  # oldest waiting sequences that `lpm` compares
DECODE_SLOWDOWN = 2.0  # of streams while prompts are computed, if no target says otherwise
FIXED_SHARE = 0.05  # of a step's time, where it can be chosen
LEAST_SHARE = 1 / 4  # of the budget, which `decode-first` gives to prompts at least


class Fairness(msgspec.Struct, frozen=True, kw_only=True):
    """How long a waiting sequence may be passed by others."""

    lpm_ageing: float = 256.0  # cached tokens that one second of waiting is worth under `lpm`
    max_passed: int = 64  # admissions that may pass a waiting sequence that does not fit
    headroom: int = 16  # tokens kept available for each running sequence when one is admitted
    scan_limit: int = 32  # waiting sequences tried in a plan that do not fit


FAIR = Fairness()


class WaitingQueue:
    """The waiting sequences, in order of arrival or of priority and arrival.

    A preempted sequence returns to its place. Under `lpm` those of the oldest MATCH_WINDOW with
    the longest cached prefix come first, where each second of waiting counts as `lpm_ageing`
    cached tokens: no sequence is passed for longer than the longest prefix is worth.
    """

    def __init__(self, policy: SchedulePolicy, ageing: float) -> None:
        self._policy = policy
        self._ageing = ageing
        self._sequences: list[Sequence] = []
        self._times_passed: dict[int, int] = {}  # by uid, where it is not 0
        self._matched: dict[int, tuple[int, int]] = {}  # by uid: tree version, tokens matched then
        self.num_tokens = 0  # that they hold together

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def key(self, sequence: Sequence) -> tuple[int, int]:
        """Sorts by service order: lower is served earlier, and preempted later."""
        priority = sequence.request.priority if self._policy == "priority" else 0
        return -priority, sequence.uid

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=self.key)
        self.num_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[bisect_left(self._sequences, self.key(sequence), key=self.key)]
        self.num_tokens -= sequence.num_tokens
        self._times_passed.pop(sequence.uid, None)
        self._matched.pop(sequence.uid, None)

    def times_passed(self, sequence: Sequence) -> int:
        """How many admissions of others have passed it since it began to wait."""
        return self._times_passed.get(sequence.uid, 0)

    def note_passed(self, sequences: list[Sequence]) -> None:
        """Another sequence is admitted before these."""
        for sequence in sequences:
            self._times_passed[sequence.uid] = self.times_passed(sequence) + 1

    def candidates(self, count: int, now: float, cache: KVCache) -> list[Sequence]:
        """The first `count` sequences to try to admit."""
        if self._policy != "lpm":
            return list(islice(self._sequences, count))
        window = list(islice(self._sequences, MATCH_WINDOW))
        score = {
            s.uid: self._num_matched(s, cache) + self._ageing * (now - s.queued_at) for s in window
        }
        window.sort(key=lambda s: (-score[s.uid], s.uid))
        return (window + list(islice(self._sequences, MATCH_WINDOW, count)))[:count]

    def _num_matched(self, sequence: Sequence, cache: KVCache) -> int:
        """Cached prefix length, looked up again only after the tree has changed."""
        version, num_tokens = self._matched.get(sequence.uid, (-1, 0))
        if version != cache.version:
            num_tokens = cache.match(sequence).num_tokens
            self._matched[sequence.uid] = cache.version, num_tokens
        return num_tokens


class TokenBudget:
    """How many prompt tokens a step computes beside its decode tokens, which always run.

    `prefill-first` gives prompts the whole budget, `decode-first` what decode leaves of it, but
    LEAST_SHARE at least: with nothing left for prompts, no more streams would run than the budget.
    `balanced` asks the roofline. Decode alone is mostly bound by memory, so prompt tokens up to
    the ridge, where arithmetic takes as long as memory traffic, cost a step next to nothing; far
    beyond it, more of them gain no throughput and delay all streams. It fills a step until its
    arithmetic takes DECODE_SLOWDOWN times what decode alone would take, and until the step's
    fixed time is a small share of it. An inter-token latency target bounds the predicted time,
    with a margin for how far predictions have been off.
    """

    def __init__(self, config: EngineConfig, cost_model: CostModel | None) -> None:
        if config.itl_target_ms is not None and cost_model is None:
            raise ValueError("itl_target_ms needs a cost model")
        self._policy = config.batch_policy
        self._size = config.chunked_prefill_size
        self._target = None if config.itl_target_ms is None else config.itl_target_ms / 1e3
        self._model = cost_model

    def prefill_tokens(self, decode: Work, start: int) -> int:
        """The prompt tokens of a step that also computes `decode`, at most the budget.

        start: computed tokens of the first prompt in line.
        """
        if not decode.num_tokens or self._policy == "prefill-first":
            return self._size
        model = self._model
        if self._policy == "decode-first" or model is None:
            return max(self._size - decode.num_tokens, math.ceil(LEAST_SHARE * self._size))
        alone = model.cost(decode)
        busy = max(alone.compute_seconds, alone.memory_seconds)
        filled = max(DECODE_SLOWDOWN * busy, alone.overhead / FIXED_SHARE)

        def work(count: int) -> Work:
            return decode + prefill_work(count, start)

        count = _largest(self._size, lambda n: model.cost(work(n)).compute_seconds <= filled)
        count = max(count, 1)  # a long prompt's token may cost more than a whole step of short ones
        if self._target is not None:
            limit = self._target / self._margin
            count = _largest(count, lambda n: model.predict(work(n)) <= limit)
        return count

    def admits(self, num_running: int, context: int) -> bool:
        """Whether decode for one more stream would still hold the target.

        `context` is what all of them would hold together. A single stream is always admitted.
        """
        if self._target is None or self._model is None or not num_running:
            return True
        if self._policy != "balanced":
            return True
        predicted = self._model.predict(decode_work(num_running + 1, context))
        return predicted * self._margin <= self._target

    @property
    def _margin(self) -> float:
        assert self._model is not None
        return 1.0 + 3.5 * self._model.deviation


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest n in [0, most] for which `holds`, which is true up to some n; 0 if none."""
    if holds(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
