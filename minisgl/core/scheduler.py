"""The scheduler: requests in, `Batch`es out, `StepOutput`s back, `Delta`s out.

Every sequence has tokens it holds and tokens it has computed; a step closes part of the gap.
Prefill, chunked prefill, prefix hits, decode, recompute after preemption and drafts are one case.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from time import monotonic

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, Chunk, RowSetup, StepOutput
from minisgl.core.cascade import PrefixGroups
from minisgl.core.costmodel import CostModel, StepWork
from minisgl.core.executor import Limits
from minisgl.core.kvcache import KVCache
from minisgl.core.plan import Plan, PlannedStep
from minisgl.core.policy import FAIR, Fairness, StepLoad, TokenBudget, WaitingQueue
from minisgl.core.request import Delta, FinishReason, Request, TokenLogprobs
from minisgl.core.sequence import (
    ENDED,
    PREEMPTED,
    RUNNING,
    WAITING,
    Sequence,
    make_sequences,
)
from minisgl.core.speculation import Speculation
from minisgl.core.stats import SchedulerStats

NONE: list[int] = []  # shared by all chunks that have nothing to say; never changed
NO_LOGPROBS: list[TokenLogprobs] = []


class Scheduler:
    """Continuous batching over paged, prefix-shared KV.

    `plan` may run one step ahead of `update` (overlap) or not; updates come in order of plans.
    `clock` gives seconds and is used for ageing only. Groups that share a prefix are planned where
    `config.cascade_min_shared_tokens` says from how many tokens on. Not thread-safe.
    """

    def __init__(
        self,
        limits: Limits,
        config: EngineConfig | None = None,
        eos_token_ids: frozenset[int] | set[int] | tuple[int, ...] = (),
        cost_model: CostModel | None = None,
        clock: Callable[[], float] = monotonic,
        speculation: Speculation | None = None,
        fairness: Fairness = FAIR,
    ) -> None:
        config = config or EngineConfig()
        self.limits = limits
        self.config = config
        self.cost_model = cost_model
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._speculation = speculation
        self._cache = KVCache(
            limits.num_pages,
            limits.page_size,
            radix=not config.disable_radix_cache,
            drafts=speculation is not None and speculation.on_device,
        )
        self._prefixes: PrefixGroups | None = None
        if config.cascade_min_shared_tokens is not None:
            self._prefixes = PrefixGroups(
                self._cache.pool.pages_for(config.cascade_min_shared_tokens)
            )
        self._budget = TokenBudget(config, cost_model)
        self._fairness = fairness
        self._waiting = WaitingQueue(config.schedule_policy, fairness.lpm_ageing)
        self._running: list[Sequence] = []  # in service order
        self._rows = list(range(limits.max_rows - 1, -1, -1))
        self._requests: dict[str, list[Sequence]] = {}  # unended choices
        self._returning = 0  # pages that ended or preempted ones in flight will give back
        self._steps: deque[PlannedStep] = deque()  # planned, not updated
        self._next_uid = 0
        self._num_steps = 0
        self._num_queried = 0
        self._num_hit = 0
        self._num_preemptions = 0

    # ---- requests in ------------------------------------------------------------------------

    def add(self, request: Request) -> list[int]:
        """Queue a request; returns the uids of its sequences, one per choice.

        Raises ValueError when it can never run, saying why.
        """
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is in use")
        choices = make_sequences(request, self.limits, self._eos, self._next_uid, self._clock())
        self._next_uid += len(choices)
        for sequence in choices:
            self._waiting.add(sequence)
        self._requests[request.id] = choices
        return [sequence.uid for sequence in choices]

    def abort(self, request_id: str, choice: int | None = None) -> list[Delta]:
        """End a request, or one choice of it, at once; nothing when it has ended or is unknown."""
        ended = [
            sequence
            for sequence in self._requests.get(request_id, ())
            if choice is None or sequence.choice == choice
        ]
        return [self._end(sequence, "abort") for sequence in ended]

    def continuation(self, sequence: Sequence, path: list[int], count: int) -> list[int]:
        """Up to `count` cached tokens that follow a sequence's and then `path`."""
        return self._cache.continuation(sequence, path, count)

    @property
    def has_work(self) -> bool:
        """Whether anything is unfinished: requests, or steps in flight."""
        return bool(self._requests or self._steps)

    def stats(self) -> SchedulerStats:
        pool, speculation = self._cache.pool, self._speculation
        spared = 0 if self._prefixes is None else self._prefixes.num_spared
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_cached_pages=pool.num_cached,
            num_idle_pages=pool.num_idle,
            num_steps=self._num_steps,
            num_queried_tokens=self._num_queried,
            num_hit_tokens=self._num_hit,
            num_spared_tokens=spared * self.limits.page_size,
            num_preemptions=self._num_preemptions,
            num_drafts=0 if speculation is None else speculation.num_drafts,
            num_tried_drafts=0 if speculation is None else speculation.num_tried,
            num_accepted_drafts=0 if speculation is None else speculation.num_accepted,
            draft_gain=1.0 if speculation is None else speculation.gain,
        )

    # ---- plans out --------------------------------------------------------------------------

    def plan(self) -> Batch | None:
        """The next step, or None when there is nothing to compute before the next update."""
        self._cache.begin()
        plan = Plan()
        prefilling = self._plan_decode(plan)
        num_decode = len(plan.chunks)
        if prefilling or self._can_admit():
            self._plan_prefill(plan, prefilling)
        copies, commits = self._cache.finish()
        if not plan.chunks:
            return None
        draft_chunks = []
        if self._speculation is not None:
            for seq, chunk in self._speculation.finish():
                self._cache.note_drafted(seq)
                draft_chunks.append(chunk)
        batch = Batch(
            self._num_steps,
            plan.chunks,
            num_decode,
            plan.setups,
            copies,
            plan.groups,
            draft_chunks=draft_chunks,
        )
        self._num_steps += 1
        work = StepWork(plan.num_tokens, plan.num_pairs, plan.num_context, plan.num_sampled)
        self._steps.append(PlannedStep(batch, plan.sequences, commits, work))
        return batch

    def _plan_decode(self, plan: Plan) -> list[Sequence]:
        """Plan all sequences whose next input is on the device; returns those with prompt left."""
        running = tuple(self._running)
        prefilling = [seq for seq in running if seq.num_computed < seq.num_fed]
        chunks, planned, speculation = plan.chunks, plan.sequences, self._speculation
        drafting = False
        if speculation is not None:
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
            if end > seq.capacity and not self._grow(plan, seq, end):
                continue
            drafts = NONE
            if drafting:
                assert speculation is not None
                drafts = speculation.propose(seq, seq.limit - ahead - 1)
                if not self._cache.reserve(seq, end + len(drafts)):
                    drafts = NONE
                if drafts:
                    speculation.planned(seq, start)
            first, pages = seq.num_patched, NONE
            if first < len(seq.pages):
                pages, seq.num_patched = seq.pages[first:], len(seq.pages)
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
        plan.num_tokens = plan.num_sampled = num_tokens
        plan.num_pairs = plan.num_context = num_context
        if self._prefixes is not None:
            plan.sequences, plan.chunks, plan.groups = self._prefixes.arrange(planned, chunks)
            plan.num_context -= self._prefixes.spared * self.limits.page_size
        return prefilling

    def _plan_prefill(self, plan: Plan, prefilling: list[Sequence]) -> None:
        """Divide the step's prompt tokens: first to prompts under way, then to new sequences."""
        prefilling = [seq for seq in prefilling if seq.status is RUNNING]
        start = prefilling[0].num_computed if prefilling else 0
        left = self._budget.prefill_tokens(StepLoad(plan.num_tokens, plan.num_pairs, start))
        for seq in prefilling:
            if left <= 0:
                return
            left -= self._add_prefill(plan, seq, left)
        if left > 0 and not plan.short_of_pages and self._can_admit():
            self._admit(plan, left)

    def _can_admit(self) -> bool:
        """Whether anybody waits, for whom there are a row and pages (see `headroom`)."""
        available = self._cache.pool.num_available
        return bool(self._waiting and self._rows) and len(self._running) < available

    def _admit(self, plan: Plan, left: int) -> None:
        """Start waiting sequences. One that does not fit is passed by, but not for ever."""
        fairness = self._fairness
        tries = min(len(self._rows), left) + fairness.scan_limit
        stuck: list[Sequence] = []
        context = sum(seq.num_tokens for seq in self._running) if self.config.itl_target_ms else 0
        for seq in self._waiting.candidates(tries, self._clock(), self._matched):
            if left <= 0 or not self._rows:
                return
            if not self._budget.admits(len(self._running), context + seq.num_tokens):
                return
            match = self._cache.match(seq)
            if self._cache.is_fresh(match):
                continue
            # A page for each running sequence, which it will soon need; and twice as many more
            # each time this one was preempted, so that it comes to an end.
            headroom = len(self._running) + 2**seq.preemptions - 1 if self._running else 0
            if not self._cache.attach(seq, match, headroom):
                stuck.append(seq)
                if seq.times_passed >= fairness.max_passed or len(stuck) >= fairness.scan_limit:
                    return
                continue
            self._waiting.remove(seq)
            for other in stuck:
                other.times_passed += 1
            seq.times_passed = 0
            seq.status = RUNNING
            seq.row = self._rows.pop()
            seq.num_fed = seq.num_tokens
            insort(self._running, seq, key=self._waiting.key)
            if not seq.epoch:
                seq.num_cached = seq.num_computed
            self._num_queried += seq.num_tokens
            self._num_hit += seq.num_computed
            plan.setups.append(self._setup(seq))
            context += seq.num_tokens
            left -= self._add_prefill(plan, seq, left)

    def _matched(self, sequence: Sequence) -> int:
        """Cached prefix length, looked up again only after the tree has changed."""
        version = self._cache.version
        if sequence.matched[0] != version:
            sequence.matched = version, self._cache.match(sequence).num_tokens
        return sequence.matched[1]

    def _setup(self, seq: Sequence) -> RowSetup:
        params = seq.request.params
        needs_tokens = params.needs_counts or params.prompt_logprobs is not None
        tokens = seq.token_ids(0, seq.num_tokens) if needs_tokens else []
        return RowSetup(seq.uid, seq.epoch, seq.row, seq.choice, len(seq.prompt), params, tokens)

    def _add_prefill(self, plan: Plan, seq: Sequence, left: int) -> int:
        """Plan up to `left` of a sequence's prompt tokens; returns how many."""
        start = seq.num_computed
        stop = min(start + left, seq.num_fed)
        samples = stop == seq.num_fed
        self._cache.commit(seq, start, stop)
        if self._speculation is not None:
            self._speculation.follow(seq, stop)
        first, pages = seq.num_patched, NONE
        if first < len(seq.pages):
            pages, seq.num_patched = seq.pages[first:], len(seq.pages)
        count = stop - start
        ids = seq.token_ids(start, stop)
        plan.chunks.append(
            Chunk(seq.uid, seq.epoch, seq.row, start, count, ids, first, pages, samples)
        )
        plan.sequences.append(seq)
        seq.num_computed = stop
        seq.num_pending = int(samples)
        seq.in_flight += 1
        plan.num_tokens += count
        plan.num_pairs += count * start + count * (count + 1) // 2
        plan.num_context += stop
        plan.num_sampled += samples
        if samples and self._prefixes is not None:
            self._prefixes.join(seq.uid, seq.pages[: stop // self.limits.page_size])
        return count

    # ---- memory pressure --------------------------------------------------------------------

    def _grow(self, plan: Plan, seq: Sequence, num_tokens: int) -> bool:
        """Pages for `num_tokens` tokens, if need be taken from the sequence served last.

        False: this sequence sits out the step, since the pages it waits for are on their way
        back, or those that come after it have all been planned.
        """
        while not self._cache.reserve(seq, num_tokens):
            plan.short_of_pages = True
            need = self._cache.pool.pages_for(num_tokens) - len(seq.pages)
            if self._returning and need <= self._cache.pool.num_available + self._returning:
                return False
            victim = self._running[-1]
            if victim is seq or victim in plan.sequences:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's row and pages, now or once its steps in flight are back."""
        self._num_preemptions += 1
        seq.preemptions += 1
        seq.status = PREEMPTED
        self._running.remove(seq)
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        if self._prefixes is not None:
            self._prefixes.leave(seq.uid)
        if seq.in_flight:
            seq.num_returning = self._cache.pool.num_returning(seq.pages)
            self._returning += seq.num_returning
        else:
            self._settle(seq)

    def _settle(self, seq: Sequence) -> None:
        """Ended or preempted, and nothing in flight: everything goes back, once."""
        self._returning -= seq.num_returning
        seq.num_returning = 0
        if seq.row >= 0:
            self._cache.release(seq)
            self._rows.append(seq.row)
            seq.row = -1
        if seq.status is PREEMPTED:
            seq.status = WAITING
            seq.epoch += 1
            if seq.prompt_logprobs is not None:
                seq.prompt_logprobs = []
            self._waiting.add(seq)

    # ---- results back -----------------------------------------------------------------------

    def update(self, batch: Batch, output: StepOutput) -> list[Delta]:
        """Take the results of the oldest planned step; returns what is new for the users."""
        step = self._take_step(batch)
        if output.step != batch.step or len(output.token_ids) != len(batch.chunks):
            raise ValueError(f"output of step {output.step} does not fit step {batch.step}")
        if self.cost_model is not None:
            self.cost_model.observe(step.work, output.seconds)
        if self._speculation is not None:
            self._speculation.observe(batch, output)
        deltas = []
        for index, (seq, chunk) in enumerate(zip(step.sequences, batch.chunks, strict=True)):
            seq.in_flight -= 1
            if seq.status is not ENDED:
                if seq.prompt_logprobs is not None:
                    seq.prompt_logprobs += output.prompt_logprobs.get(index, NO_LOGPROBS)
                if chunk.samples:
                    deltas.append(self._take_tokens(seq, chunk, index, output))
            if seq.status is not RUNNING and not seq.in_flight and seq.row >= 0:
                self._settle(seq)
        return deltas

    def _take_tokens(self, seq: Sequence, chunk: Chunk, index: int, output: StepOutput) -> Delta:
        """Append a chunk's sampled tokens up to the sequence's end."""
        new = output.token_ids[index]
        seq.num_pending -= 1
        num_drafts, num_accepted = len(chunk.drafts), len(new) - 1
        if not 1 <= len(new) <= chunk.length:
            raise ValueError(f"step {output.step}, chunk {index}: {len(new)} tokens sampled")
        if num_drafts:
            seq.num_computed += num_accepted
            seq.num_slack -= num_drafts
            if self._speculation is not None:
                self._speculation.take(seq, num_drafts, num_accepted)
        new, reason, stopped_by = seq.accept(new)
        num_accepted = min(num_accepted, len(new))
        logprobs = output.logprobs[index][: len(new)] if index in output.logprobs else None
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        if reason is not None:
            self._finish(seq, reason)
        return Delta(
            seq.request.id,
            seq.choice,
            new,
            reason,
            stopped_by,
            logprobs,
            prompt_logprobs,
            seq.num_cached,
            num_accepted_drafts=num_accepted,
            num_rejected_drafts=num_drafts - num_accepted if num_drafts else 0,
        )

    def fail(self, batch: Batch, error: str = "the step failed") -> list[Delta]:
        """A planned step was not run, or failed: its sequences end with an error.

        What it should have written leaves the cache. Steps planned after it were built on it:
        they must be failed too, before anything else is planned.
        """
        step = next((s for s in self._steps if s.batch.step == batch.step), None)
        if step is None:
            raise ValueError(f"step {batch.step} is not in flight")
        self._steps.remove(step)
        for commit in step.commits:
            self._cache.revoke(commit)
        self._cache.forget_drafted()
        deltas = []
        for seq in step.sequences:
            seq.in_flight -= 1
            seq.keeps_pages = False
            if seq.status is not ENDED:
                deltas.append(self._end(seq, "error", error))
            elif not seq.in_flight and seq.row >= 0:
                self._settle(seq)
        return deltas

    def _take_step(self, batch: Batch) -> PlannedStep:
        if not self._steps or self._steps[0].batch.step != batch.step:
            expected = self._steps[0].batch.step if self._steps else "none"
            raise ValueError(f"step {batch.step} is not the oldest in flight ({expected})")
        return self._steps.popleft()

    # ---- ends -------------------------------------------------------------------------------

    def _end(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> Delta:
        """End a sequence from outside."""
        self._finish(seq, reason)
        return Delta(
            seq.request.id,
            seq.choice,
            [],
            reason,
            num_cached_tokens=seq.num_cached,
            error=error,
        )

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Nothing more is planned for `seq`; what it holds goes back when its steps are."""
        was, seq.status, seq.finish_reason = seq.status, ENDED, reason
        choices = self._requests[seq.request.id]
        choices.remove(seq)
        if not choices:
            del self._requests[seq.request.id]
        if was is WAITING:
            self._waiting.remove(seq)
        elif was is RUNNING:
            self._running.remove(seq)
            self._leave(seq)
        elif not seq.in_flight:
            self._settle(seq)

    def check(self) -> None:
        """Compare all books with each other, exactly. For tests; RuntimeError says what differs."""
        planned = {seq for step in self._steps for seq in step.sequences}
        leaving = [seq for seq in planned if seq.status is not RUNNING]
        self._cache.check([*self._running, *leaving])
        held = [seq.row for seq in [*self._running, *leaving]]
        if sorted(held + self._rows) != list(range(self.limits.max_rows)):
            raise RuntimeError(f"rows {held} held and {self._rows} free are not all rows, once")
        if self._returning != sum(seq.num_returning for seq in leaving):
            raise RuntimeError("pages on their way back are miscounted")
        if any(seq.pages or seq.row >= 0 or seq.in_flight for seq in self._waiting):
            raise RuntimeError("a waiting sequence holds something")
        if self._waiting.num_tokens != sum(seq.num_tokens for seq in self._waiting):
            raise RuntimeError("waiting tokens are miscounted")
