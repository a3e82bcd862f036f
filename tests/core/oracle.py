"""A hash-chain model in place of a GPU, and a driver that tortures the scheduler with it.

The "KV" of a position is a hash of everything before it. It lies in pages and is read back
through the page table built from the batches' patches; the next token is a hash of all that was
read, so one stale page changes the text. The executor behaves like hardware: dispatched steps
are queued and run at collect; copies come first, in any order, then all writes, then reads.
"""

from collections import deque
from dataclasses import dataclass, field
from random import Random

import msgspec

from minisgl.config import EngineConfig
from minisgl.core.batch import PENDING, Batch, Chunk, RowSetup, StepOutput
from minisgl.core.costmodel import CostModel, DevicePeaks, ModelSizes
from minisgl.core.draft_policy import DraftPolicy
from minisgl.core.executor import Limits
from minisgl.core.ngram import NGramProposer
from minisgl.core.policy import Fairness
from minisgl.core.request import Delta, Request, SamplingParams, TokenLogprobs
from minisgl.core.scheduler import Scheduler
from minisgl.core.sequence import Sequence
from minisgl.core.speculation import Speculation, propose_on_device

VOCAB = 23
EOS = 0
POISON = -1  # a page-table entry or slot that nothing has written

TINY_MODEL = ModelSizes(
    layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=VOCAB
)


def extend(before: int, token: int) -> int:
    """The KV of `token` after a position whose KV is `before`."""
    return hash((before, token))


def first_kv(salt: str) -> int:
    """What comes before the first position: KV of one salt is of no use to another."""
    return 1 + sum(map(ord, salt))


def next_token(kv: list[int], choice: int, held: list[int] | None) -> int:
    """The token after the positions with these KV values; `held` under a penalty."""
    counts = hash(tuple(sorted(held))) if held is not None else 0
    return hash((tuple(kv), choice, counts)) % VOCAB


def run_model(tokens: list[int], salt: str) -> list[int]:
    kv, value = [], first_kv(salt)
    for token in tokens:
        value = extend(value, token)
        kv.append(value)
    return kv


def reference(request: Request, choice: int, limits: Limits) -> tuple[list[int], str]:
    """What one choice must say, and why it ends, computed without any cache."""
    params, output = request.params, []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    capacity = min(limits.max_context, limits.num_pages * limits.page_size)
    most = params.max_tokens
    most = most or max(capacity - len(request.prompt_token_ids), params.min_tokens, 1)
    kv = run_model(request.prompt_token_ids, request.cache_salt)
    while True:
        held = request.prompt_token_ids + output if params.needs_counts else None
        token = next_token(kv, choice, held)
        output.append(token)
        if token in stops and len(output) >= params.min_tokens:
            return output, "stop"
        if len(output) == most:
            return output, "length"
        kv.append(extend(kv[-1], token))


@dataclass
class Row:
    """The device's view of a row."""

    setup: RowSetup
    table: list[int]
    length: int = 0
    last: int = POISON
    previous: int = POISON  # the token before it
    held: list[int] = field(default_factory=list)


class HashExecutor:
    """Runs batches over the hash-chain model, and refuses whatever hardware could not run."""

    def __init__(
        self, limits: Limits, random: Random, salts: dict[int, str], share_right: float = 0.5
    ) -> None:
        self.limits = limits
        self.random = random
        self.share_right = share_right  # of the draft model's proposals
        self.salts = salts  # of each sequence, by uid
        self.kv = [[POISON] * limits.page_size for _ in range(limits.num_pages)]
        self.draft_kv = [[POISON] * limits.page_size for _ in range(limits.num_pages)]
        self.num_proposed = 0
        self.rows: dict[int, Row] = {}
        self.epochs: set[tuple[int, int]] = set()
        self.queue: deque[Batch] = deque()
        self.num_grouped = 0  # chunks whose first pages were read for a whole group

    def dispatch(self, batch: Batch) -> None:
        chunks, size = batch.chunks, self.limits.page_size
        assert chunks, "an empty batch"
        assert len({c.uid for c in chunks}) == len(chunks), "a sequence twice in a batch"
        assert len({c.row for c in chunks}) == len(chunks), "a row twice in a batch"
        for index, chunk in enumerate(chunks):
            assert chunk.length > 0, "an empty chunk has no logits"
            device_fed = not chunk.token_ids
            assert device_fed == (index < batch.num_decode), "decode chunks come first"
            if device_fed:
                assert chunk.samples
                assert chunk.length == 1 + len(chunk.drafts)
            else:
                assert chunk.length == len(chunk.token_ids)
                assert not chunk.drafts
        sources = {job.source for job in batch.copies}
        targets = [job.target for job in batch.copies]
        assert len(set(targets)) == len(targets), "a page is copied to twice"
        assert not sources & set(targets), "a page is source and target in one batch"
        assert all(0 < job.num_tokens < size for job in batch.copies)
        self.queue.append(batch)

    def drop_queued(self) -> None:
        """A failure: what was dispatched is never run, and its pages hold nothing."""
        self.queue.clear()

    def collect(self) -> StepOutput:
        batch = self.queue.popleft()
        for setup in batch.setups:
            assert (setup.uid, setup.epoch) not in self.epochs, "an epoch begins twice"
            self.epochs.add((setup.uid, setup.epoch))
            table = [POISON] * (self.limits.max_context + 1)
            self.rows[setup.row] = Row(setup, table, held=list(setup.token_ids))
        for job in self.random.sample(batch.copies, len(batch.copies)):
            assert POISON not in self.kv[job.source][: job.num_tokens], "unwritten slots are copied"
            for pool in (self.kv, self.draft_kv):
                rest = [POISON] * (self.limits.page_size - job.num_tokens)
                pool[job.target] = pool[job.source][: job.num_tokens] + rest
        for chunk in batch.chunks:
            row = self.rows[chunk.row]
            assert (row.setup.uid, row.setup.epoch) == (chunk.uid, chunk.epoch), "a stale row"
            row.table[chunk.page_index : chunk.page_index + len(chunk.pages)] = chunk.pages
        self._check_groups(batch)
        for chunk in self.random.sample(batch.draft_chunks, len(batch.draft_chunks)):
            row = self.rows[chunk.row]
            assert (row.setup.uid, row.setup.epoch) == (chunk.uid, chunk.epoch), "a stale row"
            assert len(chunk.token_ids) == chunk.length > 0
            self._draft(chunk, chunk.start, chunk.token_ids)
        proposed = {c.uid: self._propose(c) for c in batch.chunks if PENDING in c.drafts}
        batch = msgspec.structs.replace(
            batch,
            chunks=[
                msgspec.structs.replace(c, drafts=proposed.get(c.uid, c.drafts))
                for c in batch.chunks
            ],
        )
        ids = {chunk.uid: self._inputs(chunk) for chunk in batch.chunks}
        written: set[tuple[int, int]] = set()
        for chunk in self.random.sample(batch.chunks, len(batch.chunks)):
            self._write(chunk, ids[chunk.uid], written)
        tokens, logprobs, prompt_logprobs = [], {}, {}
        for index, chunk in enumerate(batch.chunks):
            row = self.rows[chunk.row]
            params = row.setup.params
            if params.prompt_logprobs is not None and chunk.token_ids:
                # Position p predicts position p + 1, as far as the prompt goes.
                held = row.setup.token_ids[: row.setup.prompt_length]
                after = held[chunk.start + 1 : chunk.start + chunk.length + 1]
                prompt_logprobs[index] = [logprob_of(t) for t in after]
            new = self._sample(chunk, ids[chunk.uid]) if chunk.samples else []
            tokens.append(new)
            if params.logprobs is not None and new:
                logprobs[index] = [logprob_of(t) for t in new]
            row.length += len(new) if chunk.samples and not chunk.token_ids else chunk.length
        seconds = self.random.uniform(0.001, 0.01)
        return StepOutput(batch.step, tokens, logprobs, prompt_logprobs, seconds)

    def _check_groups(self, batch: Batch) -> None:
        """The device's own tables agree that a group's first pages are the same and filled."""
        end = 0
        for group in batch.cascade_groups:
            assert group.first >= end, "cascade groups overlap"
            end = group.first + group.count
            assert end <= batch.num_decode, "a cascade group of other than decode chunks"
            assert group.count > 1
            assert group.num_pages > 0
            rows = [self.rows[chunk.row] for chunk in batch.chunks[group.first : end]]
            pages = rows[0].table[: group.num_pages]
            assert all(row.table[: group.num_pages] == pages for row in rows), "other pages"
            shared = group.num_pages * self.limits.page_size
            assert all(shared <= row.length for row in rows), "a query would not see all keys"
            self.num_grouped += group.count

    def _inputs(self, chunk: Chunk) -> list[int]:
        row = self.rows[chunk.row]
        if chunk.token_ids:
            assert row.length in (0, chunk.start), "a chunk that does not continue its row"
            row.length = chunk.start
            return chunk.token_ids
        assert row.last != POISON, "an input that the device has not sampled"
        assert chunk.start <= row.length, "start is a lower bound"
        most, last = row.setup.params.max_tokens, row.length + len(chunk.drafts)
        assert most is None or last <= row.setup.prompt_length + most - 2, "past the known end"
        return [row.last, *chunk.drafts]

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        page = row.table[position // self.limits.page_size]
        assert page != POISON, "a position without a page"
        return page, position % self.limits.page_size

    def _read(self, row: Row, position: int) -> int:
        page, offset = self._slot(row, position)
        value = self.kv[page][offset]
        assert value != POISON, "an unwritten slot is read"
        return value

    def _draft(self, chunk: Chunk, start: int, token_ids: list[int]) -> None:
        """The draft model computes tokens from `start` on, after KV that must all be right."""
        row, value = self.rows[chunk.row], first_kv(self.salts[chunk.uid])
        for position in range(start):
            page, offset = self._slot(row, position)
            drafted, value = self.draft_kv[page][offset], self.kv[page][offset]
            assert drafted == value != POISON, "a hole is read"
        for position, token in enumerate(token_ids, start):
            page, offset = self._slot(row, position)
            value = self.draft_kv[page][offset] = extend(value, token)

    def _propose(self, chunk: Chunk) -> list[int]:
        """Drafts, right or not, whose own KV but the last one's is left behind."""
        row = self.rows[chunk.row]
        assert chunk.drafts == [PENDING] * len(chunk.drafts)
        self._draft(chunk, row.length - 1, [row.previous, row.last])
        value = extend(self._read(row, row.length - 1), row.last)
        kv = [self._read(row, position) for position in range(row.length)] + [value]
        drafts: list[int] = []
        for index in range(len(chunk.drafts)):
            held = [*row.held, *drafts] if row.setup.params.needs_counts else None
            token = next_token(kv, row.setup.choice, held)
            if self.random.random() >= self.share_right:
                token = self.random.randrange(VOCAB)
            drafts.append(token)
            kv.append(extend(kv[-1], token))
            if index < len(chunk.drafts) - 1:
                page, offset = self._slot(row, row.length + 1 + index)
                self.draft_kv[page][offset] = kv[-1]
        self.num_proposed += len(drafts)
        return drafts

    def _write(self, chunk: Chunk, ids: list[int], written: set[tuple[int, int]]) -> None:
        row = self.rows[chunk.row]
        start = row.length
        before = self._read(row, start - 1) if start else first_kv(self.salts[chunk.uid])
        for position, token in enumerate(ids, start):
            page, offset = self._slot(row, position)
            assert (page, offset) not in written, "a slot is written twice in a step"
            written.add((page, offset))
            before = self.kv[page][offset] = extend(before, token)

    def _sample(self, chunk: Chunk, ids: list[int]) -> list[int]:
        """Verify the drafts from left to right; the token after the last match comes on top."""
        row = self.rows[chunk.row]
        start = row.length
        known = start + chunk.length - len(chunk.drafts)
        kv = [self._read(row, position) for position in range(known)]
        new: list[int] = []
        for index in range(len(chunk.drafts) + 1):
            held = row.held if row.setup.params.needs_counts else None
            token = next_token(kv, row.setup.choice, held)
            new.append(token)
            row.held.append(token)
            if index == len(chunk.drafts) or chunk.drafts[index] != token:
                break
            kv.append(self._read(row, known + index))
        row.last, row.previous = new[-1], [*ids, *new][len(ids) - len(chunk.drafts) + len(new) - 2]
        return new


def logprob_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(token), [token], [-float(token)])


class Fickle(Speculation):
    """Drafts in some steps and not in others, and lets the draft model follow prompts or not."""

    def __init__(self, random: Random, *args, **options) -> None:
        super().__init__(*args, **options)
        self.random, self.steady = random, random.choice([0.5, 0.9, 1.0])

    def begin(self, num_sequences: int, prefills: bool) -> bool:
        super().begin(num_sequences, prefills)
        self.follows = self.random.random() < self.steady
        return self.random.random() < self.steady


def make_speculation(random: Random, chunk_size: int) -> Speculation:
    kind = random.choice(["oracle", "ngram", "device", "device", "adaptive"])
    count = random.randrange(1, 5)
    if kind == "oracle":
        return Speculation(make_drafter(random, random.random()), count)
    if kind == "ngram":
        return Speculation(NGramProposer(1, random.randrange(1, 4)), count)
    device = {"on_device": True, "chunk_size": chunk_size}
    if kind == "device":
        return Fickle(random, propose_on_device, count, **device)
    return Speculation(propose_on_device, count, policy=DraftPolicy(count), **device)


def make_drafter(random: Random, share_right: float):
    """Proposes up to three tokens, right ones or not, pending tokens or not."""

    def drafter(sequence: Sequence, most: int) -> list[int]:
        if random.random() < 0.3:
            return []
        request, held = sequence.request, sequence.token_ids(0, sequence.num_tokens)
        drafts: list[int] = []
        # What is pending is unknown here; the oracle may know it, a real drafter's device does.
        for _ in range(sequence.num_pending + random.randrange(1, 4)):
            kv = run_model(held + drafts, request.cache_salt)
            counted = held + drafts if request.params.needs_counts else None
            right = next_token(kv, sequence.choice, counted)
            first_draft = len(drafts) == sequence.num_pending
            wrong = first_draft or len(drafts) > sequence.num_pending
            wrong = wrong and random.random() >= share_right
            drafts.append(random.randrange(VOCAB) if wrong else right)
        return drafts[sequence.num_pending :][:most]

    return drafter


def make_request(random: Random, index: int, bases: list[list[int]], limits: Limits) -> Request:
    """A small prompt over a tiny alphabet, often sharing a prefix with others."""
    base = random.choice(bases)
    prompt = base[: random.randrange(len(base) + 1)]
    prompt = prompt + [random.randrange(1, 3) for _ in range(random.randrange(1, 6))]
    capacity = min(limits.max_context, limits.num_pages * limits.page_size)
    prompt = prompt[: max(capacity - 1, 1)]
    most = capacity - len(prompt) + 1
    max_tokens = random.randrange(1, min(most, random.choice([6, 24])) + 1)
    params = SamplingParams(
        max_tokens=None if random.random() < 0.05 and most < 60 else max_tokens,
        min_tokens=random.randrange(max_tokens + 1) if random.random() < 0.2 else 0,
        ignore_eos=random.random() < 0.2,
        stop_token_ids=(random.randrange(VOCAB),) if random.random() < 0.2 else (),
        n=random.randrange(2, 4) if random.random() < 0.15 else 1,
        logprobs=1 if random.random() < 0.2 else None,
        prompt_logprobs=1 if random.random() < 0.1 else None,
        presence_penalty=1.0 if random.random() < 0.15 else 0.0,
    )
    salt = random.choice(["", "", "", "a"])
    return Request(f"r{index}", prompt, params, random.randrange(3), salt)


class Trial:
    """One random trace: a scheduler, an executor, and what users have been told so far."""

    def __init__(self, random: Random) -> None:
        self.random = random
        page_size = random.choice([1, 2, 3, 4, 16])
        num_pages = random.randrange(12, 48) // page_size + 2
        context = random.choice([12, 40, 200])
        self.limits = Limits(num_pages, page_size, random.randrange(2, 6), context, VOCAB)
        self.depth = random.choice([0, 1, 1])
        target = random.choice([None, None, 0.01, 5.0])
        batch_policy = random.choice(["balanced", "prefill-first", "decode-first"])
        unshared = random.random() < 0.1  # then neither matches nor groups can be asked for
        config = EngineConfig(
            chunked_prefill_size=random.choice([1, 3, 7, 24]),
            schedule_policy=random.choice(["fcfs", "priority"] + ["lpm"] * (not unshared)),
            batch_policy=batch_policy,
            itl_target_ms=target if batch_policy == "balanced" else None,
            disable_radix_cache=unshared,
            cascade_min_shared_tokens=None if unshared else random.choice([None, 1, 1, 9]),
        )
        fairness = Fairness(max_passed=random.choice([1, 64]))
        cost_model = None
        if target is not None or random.random() < 0.2:
            cost_model = CostModel(TINY_MODEL, DevicePeaks(1e6, 1e6, 1e-3))
        speculation = None
        if random.random() < 0.4:
            speculation = make_speculation(random, config.chunked_prefill_size)
        self.time = 0.0
        self.scheduler = Scheduler(
            self.limits, config, (EOS,), cost_model, lambda: self.time, speculation, fairness
        )
        self.salts: dict[int, str] = {}
        self.executor = HashExecutor(self.limits, random, self.salts, random.random())
        self.requests: dict[str, Request] = {}
        self.said: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], str] = {}
        self.in_flight: deque[Batch] = deque()
        self.bases = [
            [random.randrange(1, 3) for _ in range(random.randrange(1, 20))] for _ in "ab"
        ]

    def run(self, num_requests: int) -> None:
        random, scheduler = self.random, self.scheduler
        steps = 0
        while len(self.requests) < num_requests or scheduler.has_work:
            steps += 1
            assert steps < 1500, "no end in sight"
            self.time += random.random()
            while len(self.requests) < num_requests and random.random() < 0.5:
                self.add(make_request(random, len(self.requests), self.bases, self.limits))
            if self.requests and random.random() < 0.06:
                self.abort()
            if self.in_flight and random.random() < 0.01:
                self.fail()
            self.step()
        self.check_end()

    def add(self, request: Request) -> None:
        for choice in range(request.params.n):
            self.salts[len(self.salts)] = request.cache_salt
            self.said[request.id, choice] = []
        self.requests[request.id] = request
        self.scheduler.add(request)

    def abort(self) -> None:
        request = self.requests[self.random.choice(list(self.requests))]
        choice = self.random.choice([None, *range(request.params.n)])
        deltas = self.scheduler.abort(request.id, choice)
        chosen = range(request.params.n) if choice is None else [choice]
        open_ones = {c for c in chosen if (request.id, c) not in self.ends}
        assert {d.choice for d in deltas} == open_ones, "abort ends what is open, and only that"
        self.hear(deltas)
        self.scheduler.check()

    def fail(self) -> None:
        """The device is lost with all steps in flight; a fresh one takes over."""
        self.executor.drop_queued()
        while self.in_flight:
            self.hear(self.scheduler.fail(self.in_flight.popleft(), "lost"))
        self.scheduler.check()

    def step(self) -> None:
        """One turn of the engine's loop: plan, dispatch, collect what is due, update."""
        batch = self.scheduler.plan()
        if batch is not None:
            self.executor.dispatch(batch)
            self.in_flight.append(batch)
        elif not self.in_flight:
            assert not self.scheduler.has_work, "work, but nothing planned and nothing in flight"
        if len(self.in_flight) > (self.depth if batch is not None else 0):
            self.hear(self.scheduler.update(self.in_flight.popleft(), self.executor.collect()))
        self.scheduler.check()

    def hear(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = delta.request_id, delta.choice
            params = self.requests[delta.request_id].params
            assert key not in self.ends, "news after the end"
            first = not self.said[key]
            self.said[key] += delta.token_ids
            assert delta.token_ids or delta.finish_reason in ("abort", "error")
            if params.logprobs is not None and delta.token_ids:
                assert [lp.token_id for lp in delta.logprobs] == delta.token_ids
            if params.prompt_logprobs is not None and delta.token_ids and first:
                prompt = self.requests[delta.request_id].prompt_token_ids
                assert [lp.token_id for lp in delta.prompt_logprobs] == prompt[1:]
                assert not delta.num_cached_tokens
            else:
                assert delta.prompt_logprobs is None
            if delta.finish_reason is not None:
                self.ends[key] = delta.finish_reason
                stopped = delta.finish_reason == "stop"
                assert delta.stop_token_id == (delta.token_ids[-1] if stopped else None)
                assert (delta.error is not None) == (delta.finish_reason == "error")

    def check_end(self) -> None:
        for (request_id, choice), said in self.said.items():
            expected, reason = reference(self.requests[request_id], choice, self.limits)
            ended = self.ends[request_id, choice]
            if ended in ("abort", "error"):
                assert said == expected[: len(said)], (request_id, choice, said, expected)
            else:
                assert (said, ended) == (expected, reason), (request_id, choice)
        stats = self.scheduler.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_free_pages + stats.num_cached_pages == self.limits.num_pages
        assert stats.num_idle_pages == stats.num_cached_pages


def run_trial(seed: int, num_requests: int = 5) -> Trial:
    trial = Trial(Random(seed))
    trial.run(num_requests)
    return trial
