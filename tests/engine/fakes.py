"""An engine without a model: its KV is a hash of all tokens before, its next token that hash.

The KV lies in pages and is read back through the page table, and steps run only when collected,
so a wrong page, a stale row or a lost token changes the text. `expected` is the oracle.
"""

import hashlib
import os
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, RowSetup, StepOutput
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.grammar import GrammarBackend
from minisgl.core.request import Request, SamplingParams, TokenLogprobs
from minisgl.core.scheduler import Scheduler
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo

VOCAB = 97
EOS = 96


def _mix(*values: int) -> int:
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _draw(state: int, params: SamplingParams, choice: int, allowed: list[int] | None) -> int:
    if params.temperature > 0:
        state = _mix(state, params.seed or 0, choice)
    return allowed[state % len(allowed)] if allowed is not None else state % VOCAB


def expected(request: Request, choice: int = 0, *, context: int = 256) -> list[int]:
    """The tokens this request must yield, computed without an engine."""
    params, state = request.params, 0
    for token in request.prompt_token_ids:
        state = _mix(state, token)
    limit = context - len(request.prompt_token_ids)
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    tokens: list[int] = []
    while len(tokens) < limit:
        tokens.append(_draw(state, params, choice, None))
        state = _mix(state, tokens[-1])
        stops = params.stop_token_ids + (() if params.ignore_eos else (EOS,))
        if tokens[-1] in stops and len(tokens) >= params.min_tokens:
            break
    return tokens


@dataclass
class _Row:
    setup: RowSetup
    pages: list[int] = field(default_factory=list)
    last: int = -1  # the id sampled last, known to the device only


class FakeExecutor:
    """Implements `core.executor.Executor`. `fail_at` names a step whose collection fails."""

    def __init__(self, limits: Limits, *, fail_at: int | None = None, seconds: float = 0.0) -> None:
        self.limits = limits
        self.fail_at = fail_at
        self.seconds = seconds  # how long a step takes
        self.calls: list[str] = []  # what was asked, in order
        self.most_in_flight = 0
        self.closed = False
        self.compilations = 0
        self.profiling = self.traces = False
        self._kv = np.zeros((limits.num_pages, limits.page_size), dtype=np.uint64)
        self._rows: dict[int, _Row] = {}
        self._queue: deque[tuple[Batch, GrammarMasks | None]] = deque()
        self._unsampled: Batch | None = None

    def dispatch(self, batch: Batch) -> None:
        assert self._unsampled is None, "a step was dispatched before the last was sampled"
        assert batch.chunks, "an empty step was dispatched"
        self.calls.append(f"dispatch {batch.step}")
        self._unsampled = batch

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        assert self._unsampled is not None
        assert self._unsampled.step == step
        self.calls.append(f"sample {step}")
        self._queue.append((self._unsampled, masks))
        self._unsampled = None
        self.most_in_flight = max(self.most_in_flight, len(self._queue))

    def collect(self) -> StepOutput:
        batch, masks = self._queue.popleft()
        self.calls.append(f"collect {batch.step}")
        begin = time.perf_counter()
        if self.seconds:
            time.sleep(self.seconds)
        if self.fail_at is not None and batch.step >= self.fail_at:
            raise RuntimeError(f"step {batch.step} hit a planted fault")
        output = self._run(batch, masks)
        if not self.profiling:
            return output
        middle, end = time.perf_counter(), time.perf_counter()
        return msgspec.structs.replace(output, spans=[(begin, middle), (middle, end)])

    def start_profile(self, *, traces: bool) -> None:
        assert not self._queue, "a profile starts with a step in flight"
        self.profiling, self.traces = True, traces

    def stop_profile(self, directory: str) -> list[str]:
        assert not self._queue, "a profile ends with a step in flight"
        self.profiling = False
        paths = [Path(directory, "rank0.trace.json")] if self.traces else []
        for path in paths:
            path.write_text("{}")
        return list(map(str, paths))

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _run(self, batch: Batch, masks: GrammarMasks | None) -> StepOutput:
        for setup in batch.setups:
            self._rows[setup.row] = _Row(setup)
        for copy in batch.copies:
            self._kv[copy.target, : copy.num_tokens] = self._kv[copy.source, : copy.num_tokens]
        tokens: list[list[int]] = []
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for index, chunk in enumerate(batch.chunks):
            row = self._rows[chunk.row]
            assert (row.setup.uid, row.setup.epoch) == (chunk.uid, chunk.epoch)
            row.pages[chunk.page_index : chunk.page_index + len(chunk.pages)] = chunk.pages
            ids = chunk.token_ids or [row.last]
            assert len(ids) == chunk.length
            state = self._read(row, chunk.start - 1) if chunk.start else 0
            for position, token in enumerate(ids, start=chunk.start):
                state = _mix(state, token)
                page, offset = divmod(position, self.limits.page_size)
                self._kv[row.pages[page], offset] = state
            tokens.append([])
            if chunk.samples:
                params = row.setup.params
                row.last = _draw(state, params, row.setup.choice, _allowed(masks, index))
                tokens[-1].append(row.last)
                if params.logprobs is not None:
                    logprobs[index] = [TokenLogprobs(row.last, -0.5, [row.last], [-0.5])]
        return StepOutput(batch.step, tokens, logprobs, {}, self.seconds)

    def _read(self, row: _Row, position: int) -> int:
        page, offset = divmod(position, self.limits.page_size)
        return int(self._kv[row.pages[page], offset])


def _allowed(masks: GrammarMasks | None, index: int) -> list[int] | None:
    if masks is None or index not in masks.indices:
        return None
    words = masks.bits[masks.indices.index(index)]
    return [token for token in range(VOCAB) if words[token // 32] >> np.uint32(token % 32) & 1]


def make_engine(
    *,
    num_pages: int = 400,
    page_size: int = 16,
    context: int = 256,
    overlap: bool = True,
    grammar_backend: GrammarBackend | None = None,
    fail_at: int | None = None,
    seconds: float = 0.0,
    profile_dir: str | None = None,
) -> Engine:
    """An engine over a `FakeExecutor`, which it shows as `engine.executor`."""
    limits = Limits(num_pages, page_size, max_rows=16, max_context=context, vocab_size=VOCAB)
    executor = FakeExecutor(limits, fail_at=fail_at, seconds=seconds)
    scheduler = Scheduler(limits, EngineConfig(chunked_prefill_size=48), (EOS,))
    info = EngineInfo("fake", "", "Fake", "float32", "cpu", [EOS], limits)
    engine = Engine(
        scheduler,
        executor,
        info,
        overlap=overlap,
        grammar_backend=grammar_backend,
        profile_dir=profile_dir,
    )
    engine.executor = executor  # type: ignore[attr-defined]
    return engine


def build(config: EngineConfig) -> Engine:
    """The factory for engine processes. `config.model` is what to plant: "seconds=0.1" or so."""
    planted = dict(item.split("=") for item in (config.model or "").split(",") if item)
    if "refuse" in planted:
        raise ValueError("planted: the model cannot be loaded")
    if "crash" in planted:
        print("planted: last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    print("x" * int(planted.get("says", 0)), file=sys.stderr)
    fail_at = int(planted["fail_at"]) if "fail_at" in planted else None
    return make_engine(
        fail_at=fail_at,
        seconds=float(planted.get("seconds", 0)),
        profile_dir=config.profile_dir,
    )
