"""The scheduler: requests in, `Batch`es out, `StepOutput`s back, `Delta`s out.

Every sequence has tokens it holds and tokens it has computed; a step closes part of the gap.
Prefill, chunked prefill, prefix hits, decode, recompute after preemption and drafts are one case.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from time import monotonic

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, Chunk, StepOutput
from minisgl.core.cascade import PrefixGroups
from minisgl.core.costmodel import CostModel
from minisgl.core.executor import Limits
from minisgl.core.forced_policy import ForcedPolicy
from minisgl.core.grammar import Forced
from minisgl.core.kvcache import KVCache
from minisgl.core.plan import Plan
from minisgl.core.planner import Planner
from minisgl.core.policy import FAIR, Fairness, WaitingQueue
from minisgl.core.request import Delta, Request, TokenLogprobs
from minisgl.core.running import Running
from minisgl.core.sequence import ENDED, RUNNING, Sequence, make_sequences
from minisgl.core.speculation import Speculation, propose_on_device
from minisgl.core.stats import SchedulerStats

NOT_FORCED = Forced([], [])
MAX_SCORED = 512  # prompt tokens in a delta with their log-probabilities: 140 kB of 20 each


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
        speculation = speculation or Speculation(propose_on_device, 0)
        self.limits = limits
        self.cost_model = cost_model
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._speculation = speculation
        self.cache = KVCache(
            limits.num_pages,
            limits.page_size,
            radix=not config.disable_radix_cache,
            drafts=speculation.on_device,
        )
        least = config.cascade_min_shared_tokens
        self._prefixes = None
        if least is not None:
            at_once = 1 if cost_model is None else cost_model.device.shared_keys
            at_once = at_once if at_once <= least else 1  # all are wanted that are asked for
            pages_for = self.cache.pool.pages_for
            self._prefixes = PrefixGroups(pages_for(least), pages_for(at_once))
        self._waiting = WaitingQueue(config.schedule_policy, fairness)
        self.running = Running(limits, self.cache, self._waiting, self._prefixes)
        self._planner = Planner(config, self.running, cost_model, speculation, clock)
        self._requests: dict[str, list[Sequence]] = {}  # unended choices
        self.plans: deque[Plan] = deque()  # their steps are in flight
        self._next_uid = 0
        self._forced = ForcedPolicy()
        self._num_forced = 0

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
        deltas = []
        for seq in list(self._requests.get(request_id, ())):
            if choice is None or seq.choice == choice:
                self._forget(seq)
                delta = Delta(request_id, seq.choice, [], "abort", num_cached_tokens=seq.num_cached)
                deltas.append(delta)
        return deltas

    @property
    def has_work(self) -> bool:
        """Whether anything is unfinished: requests, or steps in flight."""
        return bool(self._requests or self.plans)

    def stats(self) -> SchedulerStats:
        pool, speculation = self.cache.pool, self._speculation
        spared = 0 if self._prefixes is None else self._prefixes.num_spared
        return SchedulerStats(
            num_running=len(self.running.sequences),
            num_waiting=len(self._waiting),
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_cached_pages=pool.num_cached,
            num_idle_pages=pool.num_idle,
            num_steps=self._planner.num_steps,
            num_queried_tokens=self._planner.num_queried,
            num_hit_tokens=self._planner.num_hit,
            num_spared_tokens=spared * self.limits.page_size,
            num_preemptions=self.running.num_preemptions,
            num_forced_tokens=self._num_forced,
            num_drafts=speculation.num_drafts,
            num_tried_drafts=speculation.num_tried,
            num_accepted_drafts=speculation.num_accepted,
            draft_gain=speculation.gain,
        )

    def plan(self) -> Batch | None:
        """The next step, or None when there is nothing to compute before the next update."""
        plan = self._planner.plan()
        if plan is None:
            return None
        self.plans.append(plan)
        return plan.batch()

    def update(self, batch: Batch, output: StepOutput) -> list[Delta]:
        """Take the results of the oldest planned step; returns what is new for the users."""
        plan = self._oldest_plan(batch)
        if output.step != batch.step or len(output.token_ids) != len(batch.chunks):
            raise ValueError(f"output of step {output.step} does not fit step {batch.step}")
        if self.cost_model is not None:
            self.cost_model.observe(plan.work, output.seconds)
        self._speculation.observe(batch, output)
        if plan.work.num_tokens == plan.num_streams + plan.num_forced:
            self._forced.observe(plan.num_streams, plan.num_forced, output.seconds)
        deltas: list[Delta] = []
        for index, (seq, chunk) in enumerate(zip(plan.sequences, batch.chunks, strict=True)):
            seq.in_flight -= 1
            if seq.status is not ENDED:
                if seq.num_unscored and index in output.prompt_logprobs:
                    deltas += _scored(seq, chunk, output.prompt_logprobs[index])
                if chunk.samples and not _is_foretold(seq, output.token_ids[index]):
                    deltas.append(self._take_tokens(seq, chunk, index, output))
            if seq.status is not RUNNING:
                self.running.settle(seq)
        return deltas

    def looks_ahead(self) -> bool:
        """Whether grammars should be asked now for what to `force`."""
        return self._forced.looks()

    def force(self, runs: Mapping[int, Forced]) -> list[Delta]:
        """Append tokens that grammars leave no choice about, by uid, where that saves time.

        They are computed in one chunk. A step in flight, the only one, samples the first of them.
        """
        running, taken, asked = self.running.sequences, [], []
        decoding = [seq for seq in running if seq.num_computed >= seq.num_fed]
        num_forced = 0
        for seq in decoding:
            params, (run, drafts) = seq.request.params, runs.get(seq.uid, NOT_FORCED)
            known = 0  # drafts that will be accepted
            while known < min(len(run), len(drafts)) and run[known] == drafts[known]:
                known += 1
            # What is reported with a token, or counted, is known where it is drawn.
            reports = params.logprobs is not None or seq.num_unscored or params.needs_counts
            if known == len(run) or reports:
                continue
            saved = seq.num_tokens + len(run) - seq.num_computed - known - 1
            if seq.num_tokens + len(run) >= seq.limit or not seq.stop_ids.isdisjoint(run):
                taken.append((seq, run, drafts, known))  # it ends: nothing is left to compute
            elif saved:
                asked.append((seq, run, drafts, known))
                num_forced += saved
        if asked:
            limit = self._planner.budget.limit(max(seq.num_tokens for seq in decoding))
            beside = len(asked) < len(decoding)
            # A step with prompts is ragged anyway, but may have a target to hold.
            is_free = len(decoding) < len(running) and limit == math.inf
            if is_free or self._forced.pays(len(decoding), num_forced, limit, beside=beside):
                taken += asked
        return [self._append_forced(*each) for each in taken]

    def _append_forced(
        self, seq: Sequence, run: list[int], drafts: list[int], num_accepted: int
    ) -> Delta:
        if seq.num_pending:
            seq.foretold = run[: num_accepted + 1]
            seq.num_computed += num_accepted
            seq.num_pending = seq.num_slack = 0
            if drafts:
                self._speculation.take(seq, len(drafts), num_accepted)
        delta = self._append(seq, run, len(drafts), num_accepted)
        self._num_forced += max(len(delta.token_ids) - len(seq.foretold), 0)
        return delta

    def _oldest_plan(self, batch: Batch) -> Plan:
        if not self.plans or self.plans[0].step != batch.step:
            expected = self.plans[0].step if self.plans else "none"
            raise ValueError(f"step {batch.step} is not the oldest in flight ({expected})")
        return self.plans.popleft()

    def _take_tokens(self, seq: Sequence, chunk: Chunk, index: int, output: StepOutput) -> Delta:
        """Append what a chunk has sampled."""
        new = output.token_ids[index]
        seq.num_pending -= 1
        num_drafts, num_accepted = len(chunk.drafts), len(new) - 1
        if not 1 <= len(new) <= 1 + num_drafts:
            raise ValueError(f"step {output.step}, chunk {index}: {len(new)} tokens sampled")
        if num_drafts:
            seq.num_computed += num_accepted
            seq.num_slack -= num_drafts
            self._speculation.take(seq, num_drafts, num_accepted)
        return self._append(seq, new, num_drafts, num_accepted, output.logprobs.get(index))

    def _append(
        self,
        seq: Sequence,
        new: list[int],
        num_drafts: int,
        num_accepted: int,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> Delta:
        """Append tokens up to the sequence's end."""
        new, reason, stopped_by = seq.accept(new)
        num_accepted = min(num_accepted, len(new))
        if reason is not None:
            self._forget(seq)
        return Delta(
            seq.request.id,
            seq.choice,
            new,
            reason,
            stopped_by,
            None if logprobs is None else logprobs[: len(new)],
            num_cached_tokens=seq.num_cached,
            num_accepted_drafts=num_accepted,
            num_rejected_drafts=num_drafts - num_accepted if num_drafts else 0,
        )

    def _forget(self, seq: Sequence) -> None:
        """`seq` has ended; what it holds goes back when its steps have been read."""
        choices = self._requests[seq.request.id]
        choices.remove(seq)
        if not choices:
            del self._requests[seq.request.id]
        self.running.end(seq)


def _is_foretold(seq: Sequence, new: list[int]) -> bool:
    """Whether `seq` holds the tokens sampled already, because its grammar forced them."""
    foretold, seq.foretold = seq.foretold, []
    if foretold and new != foretold:
        raise ValueError(f"sequence {seq.uid}: {new} sampled, but its grammar forces {foretold}")
    return bool(foretold)


def _scored(seq: Sequence, chunk: Chunk, new: list[TokenLogprobs]) -> Iterator[Delta]:
    """The log-probabilities of a chunk's prompt tokens, but for those sent before a preemption."""
    new = new[max(len(seq.prompt) - 1 - seq.num_unscored - chunk.start, 0) :]
    seq.num_unscored -= len(new)
    for first in range(0, len(new), MAX_SCORED):
        yield Delta(seq.request.id, seq.choice, [], prompt_logprobs=new[first : first + MAX_SCORED])
