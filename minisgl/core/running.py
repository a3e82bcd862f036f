"""The running sequences: they get a row and pages, and give both back once."""

from bisect import insort
from collections.abc import Iterator

from minisgl.core.cascade import PrefixGroups
from minisgl.core.executor import Limits
from minisgl.core.kvcache import KVCache
from minisgl.core.plan import Plan
from minisgl.core.policy import WaitingQueue
from minisgl.core.sequence import ENDED, PREEMPTED, RUNNING, WAITING, Sequence


class Running:
    """The running sequences in service order, and those that leave with steps in flight.

    A sequence that has ended or been preempted keeps its row and pages until no step in flight
    uses them. Then it gives them back, and a preempted one waits again.
    """

    def __init__(
        self, limits: Limits, cache: KVCache, waiting: WaitingQueue, prefixes: PrefixGroups | None
    ) -> None:
        self.sequences: list[Sequence] = []
        self.cache = cache
        self.waiting = waiting
        self.prefixes = prefixes
        self.num_preemptions = 0
        self._num_started = 0
        self.free_rows = list(range(limits.max_rows - 1, -1, -1))
        self.leaving: dict[Sequence, int] = {}  # pages that each will make available

    @property
    def room_ahead(self) -> tuple[int, int]:
        """Rows and pages that are available, or will be when the steps in flight are read."""
        rows = len(self.free_rows) + len(self.leaving)
        return rows, self.cache.pool.num_available + sum(self.leaving.values())

    def start(self, seq: Sequence) -> None:
        """A waiting sequence, whose pages are attached, takes a row."""
        self.waiting.remove(seq)
        seq.status = RUNNING
        seq.row = self.free_rows.pop()
        seq.num_fed = seq.num_tokens
        insort(self.sequences, seq, key=self.waiting.key)
        self._num_started += 1

    def age(self) -> None:
        """For each `max_passed` admissions, let one sequence come before all others from now on.

        It is the oldest, running or waiting, that does not yet. Called between plans.
        """
        if self._num_started < self.waiting.fairness.max_passed:
            return
        self._num_started = 0
        if young := [seq for seq in (*self.sequences, *self.waiting) if not seq.aged]:
            min(young, key=lambda seq: seq.uid).aged = True
            self.sequences.sort(key=self.waiting.key)
            self.waiting.sort()

    def victims(self, seq: Sequence) -> Iterator[Sequence]:
        """Those that may be preempted for a waiting sequence of higher priority, the last first."""
        rank, most = self.waiting.rank, self.waiting.fairness.max_displaced
        for victim in reversed(self.sequences):
            if rank(victim) <= rank(seq):
                return
            if victim.epoch < most:
                yield victim

    def may_make_room(self, seq: Sequence) -> bool:
        """Whether others leave, or could be made to leave, for the waiting `seq`."""
        if self.waiting.policy != "priority":
            return False
        return bool(self.leaving) or any(self.victims(seq))

    def make_room(self, seq: Sequence, num_rows: int, num_pages: int) -> bool:
        """Preempt sequences of lower priority than the waiting `seq`, as few as will do.

        That makes so many rows and pages more available when the steps in flight are read. Pages
        kept free for those that leave (`Fairness.headroom`) count as theirs. False: they do not
        have that much, so none is preempted.
        """
        chosen = []
        kept_free = self.waiting.fairness.headroom // self.cache.page_size
        for victim in self.victims(seq):
            if num_rows <= 0 and num_pages <= 0:
                break
            chosen.append(victim)
            num_rows -= 1
            num_pages -= self.cache.pool.num_returning(victim.kv.pages) + kept_free
        if num_rows > 0 or num_pages > 0:
            return False
        for victim in chosen:
            self._preempt(victim)
        return True

    def grow(self, plan: Plan, seq: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens, if need be taken from the sequence served last.

        False: this sequence sits out the step, because enough pages will come back when steps in
        flight are read, or because all that are served after it have been planned.
        """
        while not self.cache.reserve(seq, num_tokens):
            plan.short_of_pages = True
            need = self.cache.pool.pages_for(num_tokens) - seq.kv.count
            if self.leaving and need <= self.room_ahead[1]:
                return False
            victim = self.sequences[-1]
            if victim is seq or victim in plan.sequences:
                return False
            self._preempt(victim)
        return True

    def end(self, seq: Sequence) -> None:
        """Nothing more is planned for `seq`, wherever it is."""
        was, seq.status = seq.status, ENDED
        if was is WAITING:
            self.waiting.remove(seq)
        elif was is RUNNING:
            self._leave(seq)
        else:
            self.settle(seq)

    def settle(self, seq: Sequence) -> None:
        """If `seq` no longer runs and nothing is in flight, it gives back its row and pages."""
        if seq.status is RUNNING or seq.in_flight or seq.row < 0:
            return
        del self.leaving[seq]
        self.cache.release(seq)
        self.free_rows.append(seq.row)
        seq.row = -1
        if seq.status is PREEMPTED:
            seq.status = WAITING
            seq.epoch += 1
            self.waiting.add(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        seq.status = PREEMPTED
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        self.sequences.remove(seq)
        if self.prefixes is not None:
            self.prefixes.leave(seq.uid)
        self.leaving[seq] = self.cache.pool.num_returning(seq.kv.pages)
        self.settle(seq)
