"""One API call in the engine: submits its requests, turns their deltas into text."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from minisgl.core.request import Delta, FinishReason, Request, TokenLogprobs
from minisgl.engine.client import EngineDeadError, ProcessClient
from minisgl.server.body import ApiError
from minisgl.server.calls import Call
from minisgl.server.structured import in_clients_words, refused
from minisgl.server.text import TextStream
from minisgl.server.tokenizer import Tokenizer

T = TypeVar("T")


class Scored(NamedTuple):
    """A token and its log-probabilities: None for a prompt's first, which nothing precedes."""

    token_id: int
    logprobs: TokenLogprobs | None


class Part(NamedTuple):
    """New text of one choice. An echoed prompt is in the first part, not in `num_tokens`."""

    choice: int  # over all prompts of the call
    text: str
    num_tokens: int
    scored: list[Scored]  # empty unless log-probabilities were asked for
    finish_reason: FinishReason | None
    is_first: bool  # of its choice
    texts: Sequence[str] = ()  # what each token added; an echoed prompt is in none


@dataclass
class Usage:
    """Tokens of one call, exact: every token counts that was computed for it, the last included."""

    prompt_tokens: int
    completion_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt tokens found in the cache

    def add(self, request: int, delta: Delta, num_tokens: int) -> None:
        self.completion_tokens += num_tokens
        self.accepted_drafts += min(delta.num_accepted_drafts, num_tokens)
        self.rejected_drafts += delta.num_rejected_drafts
        # Further choices of a request find the first one's prompt in the cache; that is not a hit.
        known = self.cached.get(request, delta.num_cached_tokens)
        self.cached[request] = min(known, delta.num_cached_tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())


class Generation:
    """Runs a call. Iterate `parts()` once, inside `aclosing`: leaving early aborts the requests."""

    def __init__(self, call: Call, engine: ProcessClient, tokenizer: Tokenizer) -> None:
        self.call = call
        self.usage = Usage(sum(len(request.prompt_token_ids) for request in call.requests))
        self._engine = engine
        self._n = call.params.n
        shown = tokenizer.special_ids(call.form.marks)
        self._streams = [
            TextStream(tokenizer, r.params, shown) for r in call.requests for _ in range(self._n)
        ]
        self._begun: set[int] = set()

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The parts as they come. Raises ApiError when the engine refuses or fails."""
        deltas = [self._deltas(index, r) for index, r in enumerate(self.call.requests)]
        async with aclosing(deltas[0] if len(deltas) == 1 else merge(deltas)) as merged:
            async for index, delta in merged:
                if (part := self._part(index, delta)) is not None:
                    yield part

    async def _deltas(
        self, index: int, request: Request
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        try:
            async with aclosing(self._engine.submit(request)) as deltas:
                async for delta in deltas:
                    yield index, delta
        except ValueError as error:
            raise refused(str(error), self.call.structured_by) from error
        except EngineDeadError as error:
            raise engine_failed(str(error), 503) from error

    def _part(self, index: int, delta: Delta) -> Part | None:
        if delta.refused:
            reason = delta.error or "the request is refused"
            raise refused(reason, self.call.structured_by, self.call.form)
        if delta.finish_reason == "error":
            raise engine_failed(delta.error or "the engine failed")
        if delta.finish_reason == "abort":
            raise engine_failed("the request was aborted: the server is shutting down", 503)
        if delta.warnings is not None:
            by, form = self.call.structured_by, self.call.form
            self.call.warnings[:] = [in_clients_words(each, by, form) for each in delta.warnings]
            return None
        choice = index * self._n + delta.choice
        stream = self._streams[choice]
        if stream.finish_reason is not None:
            return None  # it was in flight when a stop string ended the choice
        piece = stream.feed(delta)
        if stream.stop_string is not None and delta.finish_reason is None:
            self._engine.abort(delta.request_id, delta.choice)
        self.usage.add(index, delta, len(piece.token_ids))
        entries = [*(delta.prompt_logprobs or ()), *piece.logprobs]
        text, scored = piece.text, [Scored(entry.token_id, entry) for entry in entries]
        is_first = choice not in self._begun
        if is_first:
            self._begun.add(choice)
            if self.call.echo is not None:
                text = self.call.echo[index].text + text
                if self.call.params.prompt_logprobs is not None:
                    scored.insert(0, Scored(self.call.requests[index].prompt_token_ids[0], None))
        count, ended = len(piece.token_ids), piece.finish_reason
        return Part(choice, text, count, scored, ended, is_first, piece.texts)


def engine_failed(reason: str, status: int = 500) -> ApiError:
    """An error with the first line of the reason; clients do not get the log lines after it."""
    first = reason.splitlines()[0].removesuffix("; its last lines were:")
    return ApiError(first, status=status, type="server_error", code="engine_error")


async def merge(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield the items of all streams as they come. The first error ends all."""
    queue: asyncio.Queue[T | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
        finally:
            queue.put_nowait(None)

    async with AsyncExitStack() as stack:
        tasks = [asyncio.create_task(pump(stream)) for stream in streams]
        stack.push_async_callback(_cancel, tasks)
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is not None:
                yield item
                continue
            running -= 1
            for task in tasks:
                if task.done() and not task.cancelled() and (error := task.exception()):
                    raise error


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
