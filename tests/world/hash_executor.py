"""A hash-chain model in place of a GPU: what tests of scheduler and engine run on.

The "KV" of a position is a hash of everything before it. It lies in pages and is read back
through the page table built from the batches' patches; the next token is a hash of all that was
read, so one stale page changes the text. The executor behaves like hardware: dispatched steps
are queued and run at collect; copies come first, in any order, then all writes, then reads.
`reference` is the oracle.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from minisgl.core.batch import PENDING, Batch, Chunk, RowSetup, StepOutput
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.request import Request, SamplingParams, TokenLogprobs
from minisgl.interrupts import let_through

EOS = 0
POISON = -1  # a page-table entry or slot that nothing has written


def extend(before: int, token: int) -> int:
    """The KV of `token` after a position whose KV is `before`."""
    return hash((before, token))


def first_kv(salt: str) -> int:
    """What comes before the first position: KV of one salt is of no use to another."""
    return 1 + sum(map(ord, salt))


def next_token(
    kv: list[int],
    params: SamplingParams,
    choice: int,
    held: list[int],
    vocab: int,
    allowed: list[int] | None = None,
) -> int:
    """The token after the positions with these KV values, whose tokens are `held`."""
    params = params.completed()
    counts = hash(tuple(sorted(held))) if params.needs_counts else 0
    seed = params.seed or 0 if params.temperature > 0 else 0
    drawn = hash((tuple(kv), choice, seed, counts))
    return drawn % vocab if allowed is None else allowed[drawn % len(allowed)]


def allowed_at(form: int, position: int, vocab: int) -> list[int]:
    """The tokens that a form, a number, allows at a position: often a single one."""
    drawn = hash((form, position))
    return [drawn // 8 % vocab] if drawn % 8 < 5 else list(range(drawn % 3, vocab, 2))


def run_model(tokens: list[int], salt: str) -> list[int]:
    kv, value = [], first_kv(salt)
    for token in tokens:
        value = extend(value, token)
        kv.append(value)
    return kv


def reference(
    request: Request, choice: int, limits: Limits, form: int | None = None
) -> tuple[list[int], str]:
    """What one choice must say, and why it ends, computed without any cache."""
    params, output = request.params, []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    capacity = min(limits.max_context, limits.num_pages * limits.page_size)
    most = params.max_tokens
    most = most or max(capacity - len(request.prompt_token_ids), params.min_tokens, 1)
    kv = run_model(request.prompt_token_ids, request.cache_salt)
    while True:
        held = request.prompt_token_ids + output
        allowed = None if form is None else allowed_at(form, len(held), limits.vocab_size)
        token = next_token(kv, params, choice, held, limits.vocab_size, allowed)
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
    """A `core.executor.Executor` that refuses whatever hardware could not run."""

    def __init__(
        self,
        limits: Limits,
        random: Random | None = None,
        salts: Mapping[int, str] | None = None,
        share_right: float = 0.5,
        forms: Mapping[int, int] | None = None,
        *,
        fail_at: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """salts and forms: of sequences, by uid. share_right: of the draft model's proposals.
        fail_at: a step whose collection fails, and all after it. seconds: how long a step takes,
        waited for; None: no time, though another is reported."""
        self.limits = limits
        self.random = random or Random(0)
        self.salts = {} if salts is None else salts
        self.share_right = share_right
        self.forms = {} if forms is None else forms
        self.begun: dict[int, Batch] = {}  # steps whose drafts were asked for, with these
        self.fail_at = fail_at
        self.seconds = seconds
        self.calls: list[str] = []  # what was asked, in order
        self.most_in_flight = 0
        self.compilations = 0
        self.closed = False
        self.profiling = self.traces = False
        self.kv = [[POISON] * limits.page_size for _ in range(limits.num_pages)]
        self.draft_kv = [[POISON] * limits.page_size for _ in range(limits.num_pages)]
        self.num_proposed = 0
        self.rows: dict[int, Row] = {}
        self.epochs: set[tuple[int, int]] = set()
        self.unsampled: Batch | None = None
        self.queue: deque[tuple[Batch, GrammarMasks | None]] = deque()
        self.num_grouped = 0  # chunks whose first pages were read for a whole group

    def dispatch(self, batch: Batch) -> None:
        self.calls.append(f"dispatch {batch.step}")
        assert self.unsampled is None, "a step was dispatched before the last was sampled"
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
        self.unsampled = batch

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        self.calls.append(f"sample {step}")
        assert self.unsampled is not None
        assert self.unsampled.step == step, "another step was dispatched"
        self.queue.append((self.unsampled, masks))
        self.unsampled = None
        self.most_in_flight = max(self.most_in_flight, len(self.queue))

    def drafts(self, step: int) -> list[list[int]]:
        assert self.unsampled is not None
        assert self.unsampled.step == step, "another step was dispatched"
        assert not self.queue, "drafts rest on tokens that are not sampled"
        self.begun[step] = self._begin(self.unsampled)
        return [chunk.drafts for chunk in self.begun[step].chunks]

    def collect(self) -> StepOutput:
        batch, masks = self.queue[0]
        begin = time.perf_counter()
        with let_through():
            self.wait()
        self.queue.popleft()
        self.calls.append(f"collect {batch.step}")
        if self.fail_at is not None and batch.step >= self.fail_at:
            raise RuntimeError(f"step {batch.step} hit a planted fault")
        output = self._run(batch, masks)
        if not self.profiling:
            return output
        middle, end = time.perf_counter(), time.perf_counter()
        return msgspec.structs.replace(output, spans=[(begin, middle), (middle, end)])

    def wait(self) -> None:
        if self.seconds is not None:
            time.sleep(self.seconds)

    def start_profile(self, *, traces: bool) -> None:
        assert not self.queue, "a profile starts with a step in flight"
        self.profiling, self.traces = True, traces

    def stop_profile(self, directory: str) -> list[str]:
        assert not self.queue, "a profile ends with a step in flight"
        self.profiling = False
        paths = [Path(directory, "rank0.trace.json")] if self.traces else []
        for path in paths:
            path.write_text("{}")
        return list(map(str, paths))

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _begin(self, batch: Batch) -> Batch:
        """What comes before the forward pass; the batch with the drafts that were proposed."""
        served = {(chunk.uid, chunk.epoch) for chunk in batch.chunks}
        for setup in batch.setups:
            assert (setup.uid, setup.epoch) in served, "a row that the step has nothing for"
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
        chunks = [
            msgspec.structs.replace(c, drafts=proposed.get(c.uid, c.drafts)) for c in batch.chunks
        ]
        return msgspec.structs.replace(batch, chunks=chunks)

    def _run(self, batch: Batch, masks: GrammarMasks | None) -> StepOutput:
        batch = self.begun.pop(batch.step, None) or self._begin(batch)
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
            allowed = allowed_tokens(masks, index, self.limits.vocab_size)
            new = self._sample(chunk, ids[chunk.uid], allowed) if chunk.samples else []
            tokens.append(new)
            if params.logprobs is not None and new:
                logprobs[index] = [logprob_of(t) for t in new]
            row.length += len(new) if chunk.samples and not chunk.token_ids else chunk.length
        seconds = self.seconds or self.random.uniform(0.001, 0.01)
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

    def _first_kv(self, chunk: Chunk) -> int:
        return first_kv(self.salts.get(chunk.uid, ""))

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
        row, value = self.rows[chunk.row], self._first_kv(chunk)
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
            form, position = self.forms.get(chunk.uid), row.length + 1 + index
            allowed = None if form is None else allowed_at(form, position, self.limits.vocab_size)
            token = self._next_token(row, kv, drafts, allowed)
            if self.random.random() >= self.share_right:
                token = self.random.randrange(self.limits.vocab_size)
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
        before = self._read(row, start - 1) if start else self._first_kv(chunk)
        for position, token in enumerate(ids, start):
            page, offset = self._slot(row, position)
            assert (page, offset) not in written, "a slot is written twice in a step"
            written.add((page, offset))
            before = self.kv[page][offset] = extend(before, token)

    def _next_token(
        self, row: Row, kv: list[int], drafts: list[int], allowed: list[int] | None = None
    ) -> int:
        held, vocab = [*row.held, *drafts], self.limits.vocab_size
        return next_token(kv, row.setup.params, row.setup.choice, held, vocab, allowed)

    def _sample(self, chunk: Chunk, ids: list[int], allowed: list[list[int]]) -> list[int]:
        """Verify the drafts from left to right; the token after the last match comes on top."""
        row = self.rows[chunk.row]
        start = row.length
        known = start + chunk.length - len(chunk.drafts)
        kv = [self._read(row, position) for position in range(known)]
        new: list[int] = []
        for index in range(len(chunk.drafts) + 1):
            token = self._next_token(row, kv, [], allowed[index] if allowed else None)
            new.append(token)
            row.held.append(token)
            if index == len(chunk.drafts) or chunk.drafts[index] != token:
                break
            kv.append(self._read(row, known + index))
        row.last, row.previous = new[-1], [*ids, *new][len(ids) - len(chunk.drafts) + len(new) - 2]
        return new


def logprob_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(token), [token], [-float(token)])


def allowed_tokens(masks: GrammarMasks | None, chunk: int, vocab: int) -> list[list[int]]:
    """The tokens that a chunk's mask allows at each position that is verified; [] without one."""
    if masks is None:
        return []
    return [
        [token for token in range(vocab) if words[token // 32] >> np.uint32(token % 32) & 1]
        for index, words in zip(masks.indices, masks.bits, strict=True)
        if index == chunk
    ]
