"""The loop: plan N+1, dispatch it, collect N, emit its tokens. One loop for overlap and not."""

import time
from collections import deque
from collections.abc import Iterable

import msgspec
import numpy as np

from minisgl.core.batch import Batch, Chunk
from minisgl.core.executor import Executor, GrammarMasks
from minisgl.core.grammar import MOST_FORCED, Forced, Grammar, GrammarBackend, Wanted
from minisgl.core.request import Delta, Request
from minisgl.core.scheduler import Scheduler
from minisgl.engine.compiling import Compiling
from minisgl.engine.messages import EngineInfo, EngineStats
from minisgl.engine.profile import Profiler
from minisgl.log import get_logger

NO_UID = -1  # of a choice whose grammar is being compiled

log = get_logger(__name__)


class Engine:
    """Serves requests with a scheduler, which decides, and an executor, which computes.

    With `overlap`, one step stays in flight when `step` returns, so that planning and emitting
    happen while the device works. Without, every step is collected before the next is planned.
    With `force_tokens`, tokens that a grammar leaves no choice about need no steps of their own.
    Not thread-safe: one thread owns an engine.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        info: EngineInfo,
        *,
        overlap: bool = True,
        grammar_backend: GrammarBackend | None = None,
        force_tokens: bool = True,
        profile_dir: str | None = None,
    ) -> None:
        self.info = info
        self.failure: str | None = None  # why the engine stopped, once it has
        self._scheduler = scheduler
        self._executor = executor
        self._depth = 1 if overlap else 0  # steps in flight between two calls of `step`
        self._in_flight: deque[Batch] = deque()
        self._unsampled: Batch | None = None  # dispatched, waits for its masks
        self._open: dict[str, dict[int, int]] = {}  # request -> choice that runs -> its uid
        self._deltas: list[Delta] = []  # not returned by `step` yet
        self._backend = grammar_backend
        self._forces = force_tokens
        self._compiling = Compiling(grammar_backend)
        self._grammars: dict[int, Grammar] = {}  # by uid, of constrained sequences
        self._steps = self._tokens = self._output_tokens = 0
        self._longest_step = 0.0
        self._next_step = 0
        self._profiler = Profiler(profile_dir, executor, info)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError when it can never be served, naming what is wrong."""
        if self.failure is not None:
            raise RuntimeError(f"the engine has stopped: {self.failure}")
        params = request.params.completed(self.info.sampling_defaults)
        request = msgspec.structs.replace(request, params=params)
        if request.id in self._open:
            raise ValueError(f"request id {request.id!r} is in use")
        if params.structured_outputs is None:
            self._open[request.id] = dict(enumerate(self._scheduler.add(request)))
        else:
            self._compiling.add(request)
            self._open[request.id] = dict.fromkeys(range(params.n), NO_UID)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a choice, or all of a request's; unknown ones are ignored, for they have ended."""
        if self.failure is None:
            deltas = self._scheduler.abort(request_id, choice)
            if request_id in self._compiling:
                ended = [each for each in self._open[request_id] if choice in (None, each)]
                deltas = [Delta(request_id, each, [], "abort") for each in ended]
            self._take(deltas)

    def abort_all(self) -> None:
        """End every request."""
        for request_id in list(self._open):
            self.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` would compute or return something."""
        has_work = self._scheduler.has_work or bool(self._compiling)
        return bool(self._deltas) or (self.failure is None and has_work)

    def step(self) -> list[Delta]:
        """Advance by one step; return the new deltas. Never raises for a failed step.

        A step that fails ends every request with an error, and the engine: see `failure`.
        """
        self._check()
        if self.failure is None and self._compiling:
            self._admit_compiled()
        if self.failure is None and self._scheduler.has_work:
            started = time.perf_counter()
            try:
                with self._profiler.span("step", self._next_step):
                    self._advance()
                if self._profiler.complete(self._next_step):
                    self._write_profile()
            except Exception as error:
                self._fail(error)
            self._longest_step = max(self._longest_step, time.perf_counter() - started)
        deltas, self._deltas = self._deltas, []
        return deltas

    def stats(self) -> EngineStats:
        return EngineStats(
            self._steps,
            self._tokens,
            self._output_tokens,
            self._longest_step,
            self._scheduler.stats(),
            self._executor.compilations,
        )

    def start_profile(self, num_steps: int | None = None, *, traces: bool = True) -> str:
        """Profile the next `num_steps` steps, or all until `stop_profile`; returns the directory
        that the files will be in. Without `traces` there is the step timeline alone, and steps
        are as fast as ever.

        Raises ValueError, naming the field, where there is no profile_dir, it cannot be written, a
        profile is running already or `num_steps` is below 1; RuntimeError when the engine has
        stopped.
        """
        self._settle(running=False)
        return self._profiler.start(self._next_step, num_steps, traces)

    def stop_profile(self) -> list[str]:
        """End the profile; returns its files: the step timeline, then a trace of each rank.

        Raises ValueError where no profile is running or its files cannot be written, RuntimeError
        when the engine has stopped.
        """
        self._settle(running=True)
        return self._profiler.stop()

    def close(self) -> None:
        """Release the device. Idempotent; requests still running are dropped.

        A profile that is still running is written first.
        """
        if self._profiler.running:
            self._write_profile()
        if self._backend is not None:
            self._backend.close()
        self._executor.close()

    def _write_profile(self) -> None:
        """Stop a profile that no caller waits for. The engine goes on if it cannot be written."""
        try:
            log.info("profile written: %s", ", ".join(self.stop_profile()))
        except (ValueError, RuntimeError) as error:
            log.error("the profile could not be written: %s", error)

    def _settle(self, *, running: bool) -> None:
        """Finish the steps in flight: a profile starts or stops between steps."""
        if self.failure is not None:
            raise RuntimeError(f"the engine has stopped: {self.failure}")
        self._profiler.check(running=running)
        try:
            self._sample_masked()
            self._collect(down_to=0)
        except Exception as error:
            self._fail(error)
            raise RuntimeError(f"the engine has stopped: {self.failure}") from error

    def _check(self) -> None:
        """Notice an executor that has failed, even while there is nothing to do."""
        if self.failure is None:
            try:
                self._executor.check()
            except RuntimeError as error:
                self._fail(error)

    def _advance(self) -> None:
        if self._unsampled is None and not self._begin_next():
            self._collect(down_to=0)
            return
        self._sample_masked()
        self._collect(down_to=self._depth)

    def _begin_next(self) -> bool:
        """Plan and dispatch a step. False: none can be before the steps in flight are read."""
        span, step = self._profiler.span, self._next_step
        if self._grammars and not self._in_flight:
            self._force((uid, grammar, []) for uid, grammar in self._grammars.items())
            if not self._scheduler.has_work:
                return False
        with span("plan", step):
            batch = self._scheduler.plan()
        if batch is None:
            if not self._in_flight:
                raise RuntimeError("the scheduler has unfinished requests but plans no step")
            return False
        self._next_step = batch.step + 1
        constrained = bool(self._grammars) and any(map(self._grammar_of, batch.chunks))
        with span("dispatch", step):
            self._executor.dispatch(batch)
            if not constrained:
                self._executor.sample(step)
        if constrained:
            self._unsampled = batch
        else:
            self._in_flight.append(batch)
        return True

    def _sample_masked(self) -> None:
        """Have a step that waits for its masks sampled.

        They need the tokens of all earlier steps; its forward pass runs meanwhile. An interrupt
        of that wait leaves it waiting, for the next call.
        """
        if self._unsampled is None:
            return
        self._collect(down_to=0)
        batch, self._unsampled = self._unsampled, None
        with self._profiler.span("masks", batch.step):
            self._executor.sample(batch.step, self._masks(batch))
        self._in_flight.append(batch)

    def _collect(self, down_to: int) -> None:
        while len(self._in_flight) > down_to:
            step = self._in_flight[0].step
            with self._profiler.span("collect", step):
                output = self._executor.collect()
            batch = self._in_flight.popleft()
            self._profiler.collected(batch, output)
            self._steps += 1
            self._tokens += batch.num_tokens
            with self._profiler.span("update", step):
                self._take(self._scheduler.update(batch, output))

    def _take(self, deltas: list[Delta]) -> None:
        """Advance grammars by these deltas, close what ends, and keep the deltas for `step`."""
        for delta in deltas:
            self._output_tokens += len(delta.token_ids)
            if self._grammars:
                delta = self._advance_grammar(delta)
            if delta.finish_reason is not None:
                self._close(delta)
            self._deltas.append(delta)

    def _close(self, delta: Delta) -> None:
        choices = self._open[delta.request_id]
        self._grammars.pop(choices.pop(delta.choice), None)
        if not choices:
            del self._open[delta.request_id]
            self._compiling.drop(delta.request_id)

    def _fail(self, error: Exception) -> None:
        """A step failed: no later one can rely on its KV, so every request ends with the error."""
        log.error(
            "a step failed; the engine stops and all its requests end with an error", exc_info=error
        )
        self.failure = f"{type(error).__name__}: {error}"
        for request_id, choices in self._open.items():
            for choice in choices:
                delta = Delta(request_id, choice, [], "error", error=self.failure)
                self._deltas.append(delta)
        self._open.clear()

    def _admit_compiled(self) -> None:
        """Queue the requests whose grammars are compiled; refuse those that cannot be."""
        for request, grammars in self._compiling.ready(wait_for_one=not self._scheduler.has_work):
            choices = self._open[request.id]
            try:
                if isinstance(grammars, ValueError):
                    raise grammars
                uids = self._scheduler.add(request)
            except ValueError as error:
                end = Delta(request.id, 0, [], "error", error=str(error), refused=True)
                self._take([msgspec.structs.replace(end, choice=each) for each in [*choices]])
                continue
            for choice, uid in enumerate(uids):
                if choice in choices:
                    choices[choice] = uid
                    self._grammars[uid] = grammars[choice]
                else:  # it was aborted meanwhile
                    self._scheduler.abort(request.id, choice)
            if warnings := grammars[0].warnings:
                log.warning("request %s: %s", request.id, "; ".join(warnings))
                first = next(iter(choices))
                self._deltas.append(Delta(request.id, first, [], warnings=warnings))

    def _grammar_of(self, chunk: Chunk) -> Grammar | None:
        return self._grammars.get(chunk.uid) if chunk.samples else None

    def _masks(self, batch: Batch) -> GrammarMasks | None:
        """One mask for each draft of the constrained chunks and one for what follows it.

        None when they have all ended since the batch was planned. Those whose masks fail end.
        """
        indices: list[int] = []
        wanted: list[Wanted] = []
        uids: list[int] = []
        proposed: list[list[int]] | None = None
        for index, chunk in enumerate(batch.chunks):
            grammar = self._grammar_of(chunk)
            if grammar is None:
                continue
            drafts = chunk.drafts
            if drafts and drafts[0] < 0:  # known on the device, before the forward pass ends
                proposed = proposed or self._executor.drafts(batch.step)
                drafts = proposed[index]
            uids.append(chunk.uid)
            wanted.append(Wanted(grammar, len(indices), drafts))
            indices += [index] * (1 + len(drafts))
        if not wanted or self._backend is None:
            return None
        words = (self.info.limits.vocab_size + 31) // 32
        bits = np.full((len(indices), words), 2**32 - 1, np.uint32)
        for index, reason in self._backend.fill_masks(wanted, bits).items():
            self._end_constrained(uids[index], reason)
        runs = zip(uids, wanted, strict=True)
        self._force((uid, each.grammar, each.drafts) for uid, each in runs)
        return GrammarMasks(indices, bits)

    def _force(self, known: Iterable[tuple[int, Grammar, list[int]]]) -> None:
        """Have the scheduler append what grammars force; known: uids, and drafts in flight."""
        if not (self._forces and self._scheduler.looks_ahead()):
            return
        runs = {
            uid: Forced(run, drafts)
            for uid, grammar, drafts in known
            if (run := grammar.forced(MOST_FORCED))
        }
        if runs:
            self._take(self._scheduler.force(runs))

    def _end_constrained(self, uid: int, reason: str) -> None:
        """End a sequence whose mask failed; what is sampled for it is dropped."""
        for request_id, choices in list(self._open.items()):
            for choice in [choice for choice, each in choices.items() if each == uid]:
                self._scheduler.abort(request_id, choice)
                self._take([_failed(Delta(request_id, choice, []), reason)])

    def _advance_grammar(self, delta: Delta) -> Delta:
        """Feed a sequence's grammar, the token that ended it included.

        What the grammar refuses ends the sequence with an error: its text may not pass for whole.
        """
        grammar = self._grammars.get(self._open[delta.request_id][delta.choice])
        if grammar is None:
            return delta
        for token_id in delta.token_ids:
            if (reason := grammar.accept(token_id)) is not None:
                if delta.finish_reason is None:
                    self._scheduler.abort(delta.request_id, delta.choice)
                return _failed(delta, reason)
        return delta


def _failed(delta: Delta, reason: str) -> Delta:
    """`delta` as the end of a sequence whose grammar cannot go on, by fault of the request."""
    error = f"structured_outputs cannot be kept any further: {reason}"
    return msgspec.structs.replace(delta, finish_reason="error", error=error, refused=True)
