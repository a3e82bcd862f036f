"""The offline API: `LLM` runs the engine in this process, `AsyncLLM` in one of its own.

with LLM("Qwen/Qwen3-0.6B", max_total_tokens=65536) as llm:
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=16)).text)
"""

import asyncio
import difflib
import itertools
import operator
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, cast, overload

import msgspec

from minisgl.config import EngineConfig
from minisgl.core.request import Delta, FinishReason, Request, SamplingParams, TokenLogprobs
from minisgl.engine.client import ProcessClient
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo, EngineStats
from minisgl.engine.process import EngineProcess
from minisgl.server.text import TextStream
from minisgl.server.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
Conversation = Sequence[Mapping[str, Any]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass
class CompletionOutput:
    """One choice. `token_ids` include the token that ended it; `text` has no stop and no marks.

    `stop_reason` is the stop string or the token id (EOS included) that ended it, if one did.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token, where asked for


@dataclass
class RequestOutput:
    """What came of one prompt. Times are seconds since the request was handed to the engine."""

    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None  # for every prompt token but the first
    num_cached_tokens: int = 0  # of the prompt, found in the radix cache
    ttft: float = 0.0  # until the first token of any choice
    e2e: float = 0.0  # until the last token of the last choice

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first choice."""
        return self.outputs[0].token_ids


class _Collector:
    """Turns the deltas of one request into its `RequestOutput`."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request = request
        self.output = RequestOutput(
            prompt, request.prompt_token_ids, [CompletionOutput(i) for i in range(params.n)]
        )
        self.fresh: deque[str] = deque()  # text of the first choice that nobody has read
        self._streams = [TextStream(tokenizer, params) for _ in range(params.n)]
        self.running = params.n  # choices
        self._error: str | None = None
        self._start = time.perf_counter()

    def take(self, delta: Delta) -> bool:
        """Add a delta. True when a stop string ended a choice that the engine still runs."""
        if delta.error is not None:
            self._error, self.running = delta.error, 0
            return False
        stream, choice = self._streams[delta.choice], self.output.outputs[delta.choice]
        if stream.finish_reason is not None:
            return False
        piece = stream.feed(delta)
        self.output.e2e = time.perf_counter() - self._start
        if piece.token_ids and not self.output.ttft:
            self.output.ttft = self.output.e2e
        choice.text += piece.text
        choice.token_ids += piece.token_ids
        if self.request.params.logprobs is not None:
            choice.logprobs = choice.logprobs or []
            choice.logprobs += piece.logprobs
        if delta.prompt_logprobs is not None:
            self.output.prompt_logprobs = delta.prompt_logprobs
        if delta.choice == 0:  # the others find the prompt that the first one computed
            self.output.num_cached_tokens = delta.num_cached_tokens
        if delta.choice == 0 and piece.text:
            self.fresh.append(piece.text)
        if piece.finish_reason is None:
            return False
        choice.finish_reason = piece.finish_reason
        choice.stop_reason = stream.stop_string or delta.stop_token_id
        self.running -= 1
        return delta.finish_reason is None

    def result(self) -> RequestOutput:
        """What came of the request. Raises RuntimeError, saying why, when it failed."""
        if self._error is not None:
            raise RuntimeError(f"request {self.request.id} failed: {self._error}")
        return self.output


class _NoTokenizer(Tokenizer):
    """Stands in for a model that ships none: token ids go in and come out, text does not."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise ValueError(f"{self._directory} has no tokenizer: prompts must be token ids")

    def encode_chat(self, messages: Conversation, /, **options: Any) -> list[int]:
        raise ValueError(f"{self._directory} has no tokenizer: prompts must be token ids")

    def is_special(self, token_id: int) -> bool:
        return True


class _Edge:
    """Where text becomes requests; shared by both forms of the API."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids = itertools.count()

    @classmethod
    def of(cls, info: EngineInfo) -> Self:
        directory = Path(info.model_path)
        if any((directory / name).is_file() for name in TOKENIZER_FILES):
            return cls(Tokenizer.from_directory(directory))
        return cls(_NoTokenizer(info.model_path))

    def chat_prompts(
        self, messages: Conversation | Sequence[Conversation], options: Mapping[str, Any]
    ) -> tuple[list[list[int]], bool]:
        """The conversations as token ids, and whether there was but one: a list of messages."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if single else messages)
        return [self.tokenizer.encode_chat(each, **options) for each in conversations], single

    def collector(self, prompt: Prompt, params: SamplingParams) -> _Collector:
        if isinstance(prompt, str):
            text, token_ids = prompt, self.tokenizer.encode(prompt)
        else:
            text, token_ids = None, list(map(operator.index, prompt))
        if params.stop and isinstance(self.tokenizer, _NoTokenizer):
            raise ValueError(f"stop needs a tokenizer, and the model has none: {params.stop!r}")
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(64))
        name = f"offline-{next(self._ids)}"
        return _Collector(Request(name, token_ids, params), text, self.tokenizer)


def make_config(model: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> EngineConfig:
    """The configuration for keyword arguments. TypeError names unknown ones and the nearest."""
    known = [item.name for item in fields(EngineConfig)]
    for name in sorted(options.keys() - known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {known}"
        raise TypeError(f"unknown option {name!r}{hint}")
    return EngineConfig(model=os.fspath(model) if model is not None else None, **options)


def _each(params: Params, count: int) -> Iterator[SamplingParams]:
    """One SamplingParams per prompt. Raises ValueError when there are more or fewer."""
    if params is None or isinstance(params, SamplingParams):
        return itertools.repeat(params or SamplingParams(), count)
    if len(params) != count:
        raise ValueError(
            f"sampling_params must be one, or one per prompt: {len(params)} for {count} prompts"
        )
    return iter(params)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> tuple[Sequence[Prompt], bool]:
    """The prompts as a list, and whether there was but one: a string, or a list of token ids."""
    single = isinstance(prompts, str) or bool(len(prompts) and not isinstance(prompts[0], Sequence))
    return cast(Sequence[Prompt], [prompts] if single else prompts), single


def _one_choice(params: SamplingParams | None) -> SamplingParams:
    if params is not None and params.n != 1:
        raise ValueError(f"n must be 1 where text is streamed, got {params.n}")
    return params or SamplingParams()


class LLM:
    """An engine in this process. Keyword arguments are `EngineConfig`'s fields.

    `model` is a directory or a hub id, the bundled model when None. Use it as a context manager, or
    call `close`. Not thread-safe; for asyncio and threads there is `AsyncLLM`.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **config: Any) -> None:
        made = make_config(model, config)
        from minisgl.build import build_engine  # here, for AsyncLLM does without torch

        self._start(build_engine(made))

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer | None = None) -> Self:
        """An LLM around an engine built elsewhere, which it owns from now on."""
        self = cls.__new__(cls)
        self._start(engine, tokenizer)
        return self

    def _start(self, engine: Engine, tokenizer: Tokenizer | None = None) -> None:
        self._engine = engine
        self._edge = _Edge(tokenizer) if tokenizer is not None else _Edge.of(engine.info)
        self._running: dict[str, _Collector] = {}
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self._edge.tokenizer

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
        return self._engine.stats()

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> RequestOutput: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Complete `prompts`: one string or list of token ids, or a list of them, freely mixed.

        One prompt gives one `RequestOutput`, a list gives a list in the same order. Every prompt is
        checked before any runs: ValueError says what cannot be served. RuntimeError when the engine
        fails. Interrupted by an exception, the engine stays usable and the requests are aborted.
        """
        prompts, single = _as_list(prompts)
        each = _each(sampling_params, len(prompts))
        collectors: list[_Collector] = []
        try:
            for prompt, params in zip(prompts, each, strict=True):
                collectors.append(self._submit(prompt, params))
            self._run(collectors, use_tqdm)
        finally:
            self._drop(collectors)
        outputs = [collector.result() for collector in collectors]
        return outputs[0] if single else outputs

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation (a list of messages) or each of a list of conversations.

        `template_options` (`tools`, ...) go to the model's chat template. Otherwise as `generate`.
        """
        prompts, single = self._edge.chat_prompts(messages, template_options)
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        return outputs[0] if single else outputs

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, RequestOutput]:
        """Yield the text of one prompt's completion as it grows; returns the `RequestOutput`.

        Closing the generator aborts the request. Other calls may run in between.
        """
        collector = self._submit(prompt, _one_choice(sampling_params))
        try:
            while collector.fresh or collector.running:
                if not collector.fresh:
                    self._step()
                while collector.fresh:
                    yield collector.fresh.popleft()
        finally:
            self._drop([collector])
        return collector.result()

    def start_profile(self, num_steps: int | None = None, *, traces: bool = True) -> str:
        """Profile the next `num_steps` steps, or all until `stop_profile`; returns the directory
        that the files will be in, a new one below the option `profile_dir`. Without `traces` there
        is the step timeline alone, and steps are as fast as ever.

        ValueError, naming the field, where there is no profile_dir or a profile is running already.
        """
        self._require_open()
        return self._engine.start_profile(num_steps, traces=traces)

    def stop_profile(self) -> list[str]:
        """End the profile; returns its files: the step timeline, then a trace of each rank."""
        self._require_open()
        return self._engine.stop_profile()

    def close(self) -> None:
        """Release the device. Idempotent."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _submit(self, prompt: Prompt, params: SamplingParams) -> _Collector:
        self._require_open()
        collector = self._edge.collector(prompt, params)
        self._engine.add(collector.request)
        self._running[collector.request.id] = collector
        return collector

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this LLM is closed")

    def _step(self) -> list[_Collector]:
        """Advance the engine; return the requests that have ended."""
        ended = []
        for delta in self._engine.step():
            if collector := self._running.get(delta.request_id):
                if collector.take(delta):
                    self._engine.abort(delta.request_id, delta.choice)
                if not collector.running:
                    ended.append(collector)
        return ended

    def _run(self, collectors: Sequence[_Collector], use_tqdm: bool) -> None:
        from tqdm import tqdm

        waiting = set(collectors)
        with tqdm(total=len(collectors), disable=not use_tqdm, unit="prompt") as bar:
            while waiting:
                ended = waiting.intersection(self._step())
                waiting -= ended
                bar.update(len(ended))

    def _drop(self, collectors: Sequence[_Collector]) -> None:
        for collector in collectors:
            del self._running[collector.request.id]
            if collector.running:
                self._engine.abort(collector.request.id)


class AsyncLLM:
    """An engine in its own process, for asyncio. `async with AsyncLLM(...) as llm: ...`.

    The process starts to load at construction; the first call waits until it is ready. Any number
    of calls may run at once, from one event loop.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **config: Any) -> None:
        self._process = EngineProcess("minisgl.build:build_engine", make_config(model, config))
        self._client: ProcessClient | None = None  # made in the event loop of the first call
        self._edge: _Edge | None = None

    async def ready(self) -> EngineInfo:
        """Wait until the model is loaded. Raises EngineDeadError when it cannot be."""
        client, _ = await self._connected()
        return client.info

    @overload
    async def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput: ...
    @overload
    async def generate(
        self, prompts: Sequence[Prompt], sampling_params: Params = None
    ) -> list[RequestOutput]: ...
    async def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None
    ) -> RequestOutput | list[RequestOutput]:
        """As `LLM.generate`. Cancelling the call aborts its requests."""
        prompts, single = _as_list(prompts)
        each = _each(sampling_params, len(prompts))
        tasks = [
            asyncio.create_task(self._complete(prompt, params))
            for prompt, params in zip(prompts, each, strict=True)
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return outputs[0] if single else outputs

    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        **template_options: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """As `LLM.chat`."""
        _, edge = await self._connected()
        prompts, single = edge.chat_prompts(messages, template_options)
        outputs = await self.generate(prompts, sampling_params)
        return outputs[0] if single else outputs

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield the text of one prompt's completion as it grows. Closing it aborts the request."""
        async with aclosing(self._follow(prompt, _one_choice(sampling_params))) as news:
            async for collector in news:
                while collector.fresh:
                    yield collector.fresh.popleft()

    async def start_profile(self, num_steps: int | None = None, *, traces: bool = True) -> str:
        """As `LLM.start_profile`."""
        client, _ = await self._connected()
        return await client.start_profile(num_steps, traces=traces)

    async def stop_profile(self) -> list[str]:
        """As `LLM.stop_profile`."""
        client, _ = await self._connected()
        return await client.stop_profile()

    async def close(self, drain_timeout: float = 0.0) -> None:
        """Finish what runs within `drain_timeout` seconds, then end the process. Idempotent."""
        if self._client is not None:
            await self._client.close(drain_timeout)
        self._process.close()

    async def __aenter__(self) -> Self:
        await self.ready()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _complete(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        async with aclosing(self._follow(prompt, params)) as news:
            collectors = [collector async for collector in news]
        return collectors[-1].output

    async def _follow(
        self, prompt: Prompt, params: SamplingParams
    ) -> AsyncGenerator[_Collector, None]:
        """Yield the collector of one request each time it has news."""
        client, edge = await self._connected()
        collector = edge.collector(prompt, params)
        async with aclosing(client.submit(collector.request)) as deltas:
            async for delta in deltas:
                if collector.take(delta):
                    client.abort(delta.request_id, delta.choice)
                yield collector
        collector.result()  # raises where the request failed

    async def _connected(self) -> tuple[ProcessClient, _Edge]:
        if self._client is None:
            self._client = ProcessClient(self._process)
        await self._client.ready()
        if self._edge is None:
            self._edge = _Edge.of(self._client.info)
        return self._client, self._edge
