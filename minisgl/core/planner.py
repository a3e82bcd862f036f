"""The planner: which tokens of which sequences the next step computes.

Decoding sequences come first, then prompts under way and waiting sequences that are admitted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from minisgl.config import EngineConfig
from minisgl.core.batch import Chunk, RowSetup
from minisgl.core.costmodel import CostModel, Work, decode_work, prefill_work
from minisgl.core.kvcache import Match
from minisgl.core.plan import Plan
from minisgl.core.policy import TokenBudget
from minisgl.core.running import Running
from minisgl.core.sequence import RUNNING, WAITING, Sequence
from minisgl.core.speculation import NONE, Speculation


@dataclass(slots=True)
class Admission:
    """How far the admissions of one plan have come."""

    context: int  # tokens that running sequences hold
    longest: int  # tokens of the longest of them
    tries: int  # of sequences that cannot be admitted, until no others are
    stuck: list[Sequence] = field(default_factory=list)  # that were tried and do not fit
    num_promised: int = 0  # rows, to sequences of high priority when others have left


class Planner:
    """Plans one step after another."""

    def __init__(
        self,
        config: EngineConfig,
        running: Running,
        cost_model: CostModel | None,
        speculation: Speculation,
        clock: Callable[[], float],
    ) -> None:
        self.num_steps = 0
        self.num_queried = 0  # prompt tokens looked up in the cache
        self.num_hit = 0  # and found
        self._running = running
        self._cache = running.cache
        self._waiting = running.waiting
        self._prefixes = running.prefixes
        self._speculation = speculation
        self._fairness = running.waiting.fairness
        self._clock = clock
        self._chunk_size = config.chunked_prefill_size
        self.budget = TokenBudget(config, cost_model)

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can be computed before the next update."""
        self._cache.begin()
        if self._waiting.policy == "priority":
            self._running.age()
        plan = Plan(self.num_steps)
        prefilling = self._plan_decode(plan)
        if prefilling or self._can_admit(plan):
            self._plan_prefill(plan, prefilling)
        plan.copies = self._cache.finish()
        if not plan.chunks:
            return None
        for seq, chunk in self._speculation.catching_up:
            self._cache.note_drafted(seq)
            plan.draft_chunks.append(chunk)
        self.num_steps += 1
        return plan

    def _plan_decode(self, plan: Plan) -> list[Sequence]:
        """Plan all sequences that decode, those that a grammar has tokens for behind the others;
        returns those with prompt left."""
        running = tuple(self._running.sequences)
        prefilling = [seq for seq in running if seq.num_computed < seq.num_fed]
        chunks, planned, speculation = plan.chunks, plan.sequences, self._speculation
        prefills = bool(prefilling) or self._can_admit(plan)
        drafting = speculation.begin(len(running) - len(prefilling), prefills)
        num_tokens = num_context = 0
        forced = []
        for seq in running:
            start = seq.num_computed
            if start < seq.num_fed:
                continue
            ahead = seq.num_tokens + seq.num_pending + seq.num_slack
            if ahead >= seq.limit or seq.status is not RUNNING:
                continue
            end = max(start + seq.num_slack + 1, seq.num_tokens)
            if end > seq.kv.capacity and not self._running.grow(plan, seq, end):
                continue
            if seq.num_tokens > start + 1:
                seq.num_fed = seq.num_tokens
                forced.append(seq)
                continue
            drafts = NONE
            if drafting:
                drafts = speculation.propose(seq, seq.limit - ahead - 1)
                if not self._cache.reserve(seq, end + len(drafts)):
                    drafts = NONE
                if drafts:
                    speculation.planned(seq, start)
            first, pages = seq.kv.num_patched, NONE
            if first < seq.kv.count:
                pages = seq.kv.patch(seq.kv.count)
            length = 1 + len(drafts)
            chunks.append(
                Chunk(seq.uid, seq.epoch, seq.row, start, length, NONE, first, pages, True, drafts)
            )
            planned.append(seq)
            seq.num_computed = start + 1
            seq.num_pending += 1
            seq.num_slack += length - 1
            seq.in_flight += 1
            num_tokens += length
            num_context += end
        num_read = num_context
        if self._prefixes is not None:
            plan.sequences, plan.chunks, plan.cascade_groups = self._prefixes.arrange(
                planned, chunks
            )
            num_read -= self._prefixes.spared * self._cache.page_size
        plan.work = Work(num_tokens, num_context, num_read, num_tokens)
        plan.num_decode = len(plan.chunks)
        plan.num_streams = len(plan.chunks) + len(forced)
        return prefilling + self._plan_forced(plan, forced)

    def _plan_forced(self, plan: Plan, forced: list[Sequence]) -> list[Sequence]:
        """Plan what grammars force, as much as half a step of prompts; returns sequences for which
        nothing was left: they are served as prompts are."""
        left = self._chunk_size // 2
        for index, seq in enumerate(forced):
            if left <= 0:
                return forced[index:]
            count = self._add_prefill(plan, seq, left)
            plan.num_forced += count - 1
            left -= count
        return []

    def _plan_prefill(self, plan: Plan, prefilling: list[Sequence]) -> None:
        """Divide the step's prompt tokens.

        First come prompts under way, then new ones; under `priority` this holds among equals.
        """
        line = [seq for seq in prefilling if seq.status is RUNNING]
        longest = max((seq.num_tokens for seq in plan.sequences), default=0)
        start = line[0].num_computed if line else 0
        decode = decode_work(plan.work.num_tokens, plan.work.num_pairs)
        left = self.budget.prefill_tokens(decode, start, longest)
        left = max(left - plan.num_forced, left // 2)  # both together fit in the budget
        if self._can_admit(plan):
            tries = min(len(self._running.free_rows), left) + self._fairness.scan_limit
            line += self._waiting.candidates(tries, self._clock(), self._cache)
            line.sort(key=self._waiting.rank)
        held = [seq.num_tokens for seq in self._running.sequences]
        admission = Admission(sum(held), max(held, default=0), self._fairness.scan_limit)
        self._serve(plan, line, left, math.inf, admission)

    def _serve(
        self, plan: Plan, line: list[Sequence], left: int, most: float, admission: Admission
    ) -> int:
        """Give up to `left` prompt tokens to sequences in turn; returns how many are left.

        Prompts of which more than `most` is to be computed are passed over. One that the step
        cannot finish takes all that is left, but short ones behind it, of no lower priority, may
        use half of that first: at most half as long as it is, and as half of the largest step.
        """
        for index, seq in enumerate(line):
            if left <= 0:
                break
            if seq.status is WAITING and admission.tries > 0:
                self._admit(plan, seq, most, admission)
            elif seq.num_fed - seq.num_computed > most:
                continue
            if seq.status is not RUNNING:
                continue
            missing = seq.num_fed - seq.num_computed
            if missing > left:
                urgency = self._waiting.urgency
                behind = [s for s in line[index + 1 :] if urgency(s) >= urgency(seq)]
                short, half = min(missing, self._chunk_size) // 2, left // 2
                left -= half - self._serve(plan, behind, half, short, admission)
                self._add_prefill(plan, seq, left)
                return 0
            left -= self._add_prefill(plan, seq, left)
        return left

    def _add_prefill(self, plan: Plan, seq: Sequence, left: int) -> int:
        """Plan up to `left` of the tokens that a sequence is fed; returns how many."""
        start = seq.num_computed
        stop = min(start + left, seq.num_fed)
        samples = stop == seq.num_fed
        self._cache.commit(seq, start, stop)
        self._speculation.follow(seq, stop)
        first, pages = seq.kv.num_patched, NONE
        needed = self._cache.pool.pages_for(stop)
        if first < needed:
            pages = seq.kv.patch(needed)
        count = stop - start
        ids = seq.token_ids(start, stop)
        plan.chunks.append(
            Chunk(seq.uid, seq.epoch, seq.row, start, count, ids, first, pages, samples)
        )
        plan.sequences.append(seq)
        seq.num_computed = stop
        seq.num_pending = int(samples)
        seq.in_flight += 1
        plan.work += prefill_work(count, start, samples=samples)
        if samples and self._prefixes is not None:
            self._prefixes.join(seq.uid, seq.kv.pages[: stop // self._cache.page_size])
        return count

    def _can_admit(self, plan: Plan) -> bool:
        """Whether a sequence waits for which there are a row and pages, or can be (`make_room`)."""
        if not self._waiting:
            return False
        first = next(iter(self._waiting))
        fits = self._running.free_rows and self._headroom(0) < self._cache.pool.num_available
        return bool(fits and not plan.short_of_pages) or any(self._running.victims(first))

    def _headroom(self, epoch: int) -> int:
        """Pages that stay available beside those of a sequence admitted in its `epoch`.

        They are for the tokens that each running sequence will soon need; and twice as many more
        each time this one was preempted, so that it comes to an end.
        """
        count = len(self._running.sequences)
        share = self._fairness.headroom
        return self._cache.pool.pages_for(share * (count + 2**epoch - 1)) if count else 0

    def _admit(self, plan: Plan, seq: Sequence, most: float, admission: Admission) -> None:
        """Admit a waiting sequence if it fits, unless more than `most` of it is to be computed.

        Others may pass one that does not fit, `max_passed` times.
        """
        running, waiting, cache = self._running, self._waiting, self._cache
        was_passed = waiting.times_passed(seq) >= self._fairness.max_passed
        context = admission.context + seq.num_tokens
        longest = max(admission.longest, seq.num_tokens if was_passed else 0)
        holds_target = self.budget.admits(len(running.sequences), context, longest)
        if holds_target or any(running.victims(seq)):
            headroom = self._headroom(seq.epoch)
            refused = None if running.may_make_room(seq) else cache.refused(seq, headroom)
            least = seq.num_tokens - most
            if cache.most_matched(seq) < least:
                return
            match = refused or cache.match(seq)
            if cache.is_fresh(match):
                return
            if match.num_tokens < least:
                admission.tries -= 1
                return
            promised = admission.num_promised
            has_room = self._make_room(seq, match, headroom, promised, int(not holds_target))
            is_free = running.free_rows and not (plan.short_of_pages or promised)
            may_start = is_free and refused is None and (holds_target or has_room)
            if has_room and may_start:  # what a sequence leaves may replace a page of the match
                match = cache.match(seq)
            headroom = self._headroom(seq.epoch)  # others may have left
            if may_start and cache.attach(seq, match, headroom):
                waiting.note_passed(admission.stuck)
                running.start(seq)
                if not seq.epoch:
                    seq.num_cached = seq.num_computed
                self.num_queried += seq.num_tokens
                self.num_hit += seq.num_computed
                plan.setups.append(_row_setup(seq))
                admission.context = context
                return
            if has_room:
                admission.num_promised += 1
                return
        admission.stuck.append(seq)
        is_last = was_passed or admission.num_promised or not running.free_rows
        admission.tries = 0 if is_last else admission.tries - 1

    def _make_room(
        self, seq: Sequence, match: Match, headroom: int, num_promised: int, num_leaving: int
    ) -> bool:
        """Under `priority`, have others leave if there is no room; False if that would not do.

        At least `num_leaving` leave, whatever room there is.
        """
        if self._waiting.policy != "priority":
            return False
        pool, (rows, pages) = self._cache.pool, self._running.room_ahead
        need = pool.pages_for(seq.num_tokens) - len(match.pages)
        need += pool.num_idle_among(match.pages) + headroom
        num_rows = max(num_promised + 1 - rows, num_leaving)
        return self._running.make_room(seq, num_rows, need - pages)


def _row_setup(seq: Sequence) -> RowSetup:
    params = seq.request.params
    needs_tokens = params.needs_counts or params.prompt_logprobs is not None
    tokens = seq.token_ids(0, seq.num_tokens) if needs_tokens else []
    bans = sorted(seq.stop_ids) if params.min_tokens else []
    return RowSetup(seq.uid, seq.epoch, seq.row, seq.choice, len(seq.prompt), params, tokens, bans)
