"""The planner: which tokens of which sequences the next step computes.

Decoding sequences come first, then prompts under way, then waiting sequences that are admitted.
"""

from collections.abc import Callable

from minisgl.config import EngineConfig
from minisgl.core.batch import Chunk, RowSetup
from minisgl.core.costmodel import CostModel, Work, decode_work, prefill_work
from minisgl.core.plan import Plan
from minisgl.core.policy import Fairness, TokenBudget
from minisgl.core.running import Running
from minisgl.core.sequence import RUNNING, Sequence
from minisgl.core.speculation import NONE, Speculation


class Planner:
    """Plans one step after another."""

    def __init__(
        self,
        config: EngineConfig,
        running: Running,
        cost_model: CostModel | None,
        speculation: Speculation,
        fairness: Fairness,
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
        self._fairness = fairness
        self._clock = clock
        self._budget = TokenBudget(config, cost_model)

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can be computed before the next update."""
        self._cache.begin()
        plan = Plan(self.num_steps)
        prefilling = self._plan_decode(plan)
        plan.num_decode = len(plan.chunks)
        if prefilling or self._can_admit():
            self._plan_prefill(plan, prefilling)
        plan.copies = self._cache.finish()
        if not plan.chunks:
            return None
        for seq, chunk in self._speculation.finish():
            self._cache.note_drafted(seq)
            plan.draft_chunks.append(chunk)
        self.num_steps += 1
        return plan

    def _plan_decode(self, plan: Plan) -> list[Sequence]:
        """Plan all sequences whose next input is on the device; returns those with prompt left."""
        running = tuple(self._running.sequences)
        prefilling = [seq for seq in running if seq.num_computed < seq.num_fed]
        chunks, planned, speculation = plan.chunks, plan.sequences, self._speculation
        prefills = bool(prefilling) or self._can_admit()
        drafting = speculation.begin(len(running) - len(prefilling), prefills)
        num_tokens = num_context = 0
        for seq in running:
            start = seq.num_computed
            if start < seq.num_fed:
                continue
            ahead = seq.num_tokens + seq.num_pending + seq.num_slack
            if ahead >= seq.limit or seq.status is not RUNNING:
                continue
            end = start + seq.num_slack + 1
            if end > seq.kv.capacity and not self._running.grow(plan, seq, end):
                continue
            drafts = NONE
            if drafting:
                drafts = speculation.propose(seq, seq.limit - ahead - 1)
                if not self._cache.reserve(seq, end + len(drafts)):
                    drafts = NONE
                if drafts:
                    speculation.planned(seq, start)
            first, pages = seq.kv.num_patched, NONE
            if first < len(seq.kv.pages):
                pages = seq.kv.patch()
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
            plan.sequences, plan.chunks, plan.groups = self._prefixes.arrange(planned, chunks)
            num_read -= self._prefixes.spared * self._cache.page_size
        plan.work = Work(num_tokens, num_context, num_read, num_tokens)
        return prefilling

    def _plan_prefill(self, plan: Plan, prefilling: list[Sequence]) -> None:
        """Divide the step's prompt tokens: first to prompts under way, then to new sequences."""
        prefilling = [seq for seq in prefilling if seq.status is RUNNING]
        start = prefilling[0].num_computed if prefilling else 0
        decode = decode_work(plan.work.num_tokens, plan.work.num_pairs)
        left = self._budget.prefill_tokens(decode, start)
        for seq in prefilling:
            if left <= 0:
                return
            left -= self._add_prefill(plan, seq, left)
        if left > 0 and not plan.short_of_pages and self._can_admit():
            self._admit(plan, left)

    def _add_prefill(self, plan: Plan, seq: Sequence, left: int) -> int:
        """Plan up to `left` of a sequence's prompt tokens; returns how many."""
        start = seq.num_computed
        stop = min(start + left, seq.num_fed)
        samples = stop == seq.num_fed
        self._cache.commit(seq, start, stop)
        self._speculation.follow(seq, stop)
        first, pages = seq.kv.num_patched, NONE
        if first < len(seq.kv.pages):
            pages = seq.kv.patch()
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

    def _can_admit(self) -> bool:
        """Whether a sequence waits, and there are a row and pages for it (see `headroom`)."""
        free = bool(self._waiting and self._running.num_free_rows)
        return free and self._headroom(0) < self._cache.pool.num_available

    def _headroom(self, epoch: int) -> int:
        """Pages that stay available beside those of a sequence admitted in its `epoch`.

        They are for the tokens that each running sequence will soon need; and twice as many more
        each time this one was preempted, so that it comes to an end.
        """
        count = len(self._running.sequences)
        share = self._fairness.headroom
        return self._cache.pool.pages_for(share * (count + 2**epoch - 1)) if count else 0

    def _admit(self, plan: Plan, left: int) -> None:
        """Admit waiting sequences. Others may pass one that does not fit, `max_passed` times."""
        fairness, running, waiting = self._fairness, self._running, self._waiting
        tries = min(running.num_free_rows, left) + fairness.scan_limit
        stuck: list[Sequence] = []
        context = sum(seq.num_tokens for seq in running.sequences)
        for seq in waiting.candidates(tries, self._clock(), self._cache):
            if left <= 0 or not running.num_free_rows:
                return
            num_running = len(running.sequences)
            if not self._budget.admits(num_running, context + seq.num_tokens):
                return
            match = self._cache.match(seq)
            if self._cache.is_fresh(match):
                continue
            if not self._cache.attach(seq, match, self._headroom(seq.epoch)):
                stuck.append(seq)
                passed = waiting.times_passed(seq)
                if passed >= fairness.max_passed or len(stuck) >= fairness.scan_limit:
                    return
                continue
            waiting.note_passed(stuck)
            running.start(seq)
            if not seq.epoch:
                seq.num_cached = seq.num_computed
            self.num_queried += seq.num_tokens
            self.num_hit += seq.num_computed
            plan.setups.append(_row_setup(seq))
            context += seq.num_tokens
            left -= self._add_prefill(plan, seq, left)


def _row_setup(seq: Sequence) -> RowSetup:
    params = seq.request.params
    needs_tokens = params.needs_counts or params.prompt_logprobs is not None
    tokens = seq.token_ids(0, seq.num_tokens) if needs_tokens else []
    bans = sorted(seq.stop_ids) if params.min_tokens else []
    return RowSetup(seq.uid, seq.epoch, seq.row, seq.choice, len(seq.prompt), params, tokens, bans)
