"""The offline API: `LLM` runs the engine in this process, `AsyncLLM` in one of its own.

with LLM("Qwen/Qwen3-0.6B", max_total_tokens=65536) as llm:
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=16)).text)
"""

import asyncio
import difflib
import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import fields
from typing import Any, Self, overload

from minisgl.completion import (
    Collector,
    Conversation,
    Params,
    Prompt,
    PromptReader,
    RequestOutput,
    as_list,
    each_params,
    one_choice,
)
from minisgl.config import EngineConfig
from minisgl.core.request import SamplingParams
from minisgl.engine.client import ProcessClient
from minisgl.engine.messages import EngineInfo, EngineStats
from minisgl.engine.process import EngineProcess
from minisgl.interrupts import held_back, let_through
from minisgl.libraries import prepare
from minisgl.log import shown_by
from minisgl.server.chat_template import read_template
from minisgl.server.pieces import PIECE
from minisgl.server.tokenizer import Tokenizer

prepare()  # here, for scripts that import torch after this and make an LLM later


def make_config(model: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> EngineConfig:
    """The configuration for keyword arguments. TypeError names unknown ones and the nearest."""
    known = [item.name for item in fields(EngineConfig)]
    for name in sorted(options.keys() - known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {known}"
        raise TypeError(f"unknown option {name!r}{hint}")
    config = EngineConfig(model=os.fspath(model) if model is not None else None, **options)
    if config.chat_template is not None:
        read_template(config.chat_template)  # refused before a model is loaded
    return config


def require_own(pid: int, kind: str) -> None:
    """Raises RuntimeError in a fork of the process `pid`, where an engine's threads are not."""
    if os.getpid() != pid:
        raise RuntimeError(
            f"this {kind} was made in another process, which this one is a fork of; make one in "
            "each process (multiprocessing: with the start method spawn)"
        )


class LLM:
    """An engine in this process. Keyword arguments are `EngineConfig`'s fields.

    `model` is a directory or a hub id, the bundled model when None. Use it as a context manager, or
    call `close`. Not thread-safe; for asyncio and threads there is `AsyncLLM`. Calls in a fork of
    the process that made it raise RuntimeError.

    Prompts go first here, unless `batch_policy` or `itl_target_ms` is given: a list is done sooner
    when its decode steps are full, and nobody reads it meanwhile. Of streams that are read in
    turns, a new one's prompt then holds up the others until it is computed.

    Where torch is imported before this class, it is slow on a CPU that other programs keep busy:
    its threads then wait long for each other. Import this first, or set GOMP_SPINCOUNT=1000.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **config: Any) -> None:
        if config.get("itl_target_ms") is None:
            config.setdefault("batch_policy", "prefill-first")
        made = make_config(model, config)
        from minisgl.build import build_engine  # here, for AsyncLLM does without torch

        self._engine = build_engine(made)
        try:
            self._reader = PromptReader(self._engine.info, made.chat_template)
        except BaseException:
            self._engine.close()
            raise
        self._running: dict[str, Collector] = {}
        self._closed = False
        self._pid = os.getpid()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._reader.tokenizer

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
        fails. Interrupted by an exception, the engine stays usable and the requests are aborted;
        Ctrl-C interrupts while a text is encoded or a step is waited for.
        """
        prompts, single = as_list(prompts)
        each = each_params(sampling_params, len(prompts))
        collectors: list[Collector] = []
        with held_back():
            try:
                for prompt, params in zip(prompts, each, strict=True):
                    with let_through():
                        collector = self._collector(prompt, params)
                    collectors.append(collector)
                    self._submit(collector)
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
        prompts, single = self._reader.chat_prompts(messages, template_options)
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        return outputs[0] if single else outputs

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, RequestOutput]:
        """Yield the text of one prompt's completion as it grows; returns the `RequestOutput`.

        Closing the generator aborts the request. Other calls may run in between.
        """
        collector = self._collector(prompt, one_choice(sampling_params))
        try:
            with held_back():
                self._submit(collector)
            while collector.fresh or collector.running:
                if not collector.fresh:
                    with held_back():
                        self._step()
                while collector.fresh:
                    yield collector.fresh.popleft()
        finally:
            with held_back():
                self._drop([collector])
        return collector.result()

    def start_profile(self, num_steps: int | None = None, *, traces: bool = True) -> str:
        """Profile the next `num_steps` steps, or all until `stop_profile`; returns the directory
        that the files will be in, a new one below the option `profile_dir`. Without `traces` there
        is the step timeline alone, and steps are as fast as ever.

        ValueError, naming the field, where there is no profile_dir or a profile is running already.
        """
        self._require_open()
        with held_back():
            return self._engine.start_profile(num_steps, traces=traces)

    def stop_profile(self) -> list[str]:
        """End the profile; returns its files: the step timeline, then a trace of each rank."""
        self._require_open()
        with held_back():
            return self._engine.stop_profile()

    def close(self) -> None:
        """Release the device. Idempotent; Ctrl-C takes effect once it is done.

        What is not closed ends with the interpreter. In a fork nothing is done: the engine is the
        parent's.
        """
        with held_back():
            self._closed = True
            if os.getpid() == self._pid:
                self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _collector(self, prompt: Prompt, params: SamplingParams) -> Collector:
        self._require_open()
        return self._reader.collector(prompt, params)

    def _submit(self, collector: Collector) -> None:
        self._engine.add(collector.request)
        self._running[collector.request.id] = collector

    def _require_open(self) -> None:
        require_own(self._pid, "LLM")
        if self._closed:
            raise RuntimeError("this LLM is closed")

    def _step(self) -> list[Collector]:
        """Advance the engine; return the requests that have ended."""
        require_own(self._pid, "LLM")
        ended = []
        for delta in self._engine.step():
            if collector := self._running.get(delta.request_id):
                if collector.take(delta):
                    self._engine.abort(delta.request_id, delta.choice)
                if not collector.running:
                    ended.append(collector)
        return ended

    def _run(self, collectors: Sequence[Collector], use_tqdm: bool) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        waiting = set(collectors)
        bar = tqdm(total=len(collectors), disable=not use_tqdm, unit="prompt")
        with bar, logging_redirect_tqdm([shown_by()]) if use_tqdm else nullcontext():
            while waiting:
                ended = waiting.intersection(self._step())
                waiting -= ended
                bar.update(len(ended))

    def _drop(self, collectors: Sequence[Collector]) -> None:
        """Forget these, and abort those that still run; those that were refused are unknown."""
        for collector in collectors:
            self._running.pop(collector.request.id, None)
            if collector.running:
                self._engine.abort(collector.request.id)


class AsyncLLM:
    """An engine in its own process, for asyncio. `async with AsyncLLM(...) as llm: ...`.

    The process starts to load at construction; the first call waits until it is ready. Any number
    of calls may run at once, from one event loop: calls from another raise RuntimeError.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **config: Any) -> None:
        made = make_config(model, config)
        self._chat_template = made.chat_template
        self._process = EngineProcess("minisgl.build:build_engine", made)
        self._client: ProcessClient | None = None  # made in the event loop of the first call
        self._reader: PromptReader | None = None
        self._closed = False
        self._pid = os.getpid()

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
        prompts, single = as_list(prompts)
        each = each_params(sampling_params, len(prompts))
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
        _, reader = await self._connected()
        prompts, single = await asyncio.to_thread(reader.chat_prompts, messages, template_options)
        outputs = await self.generate(prompts, sampling_params)
        return outputs[0] if single else outputs

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[str, None]:
        """Yield the text of one prompt's completion as it grows. Closing it aborts the request."""
        async with aclosing(self._follow(prompt, one_choice(sampling_params))) as news:
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
        """Finish what runs within `drain_timeout` seconds, then end the process. Idempotent. In a
        fork nothing is done: the engine is the parent's."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.close(drain_timeout)
        self._process.close()

    async def __aenter__(self) -> Self:
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _complete(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        async with aclosing(self._follow(prompt, params)) as news:
            collectors = [collector async for collector in news]
        return collectors[-1].output

    async def _follow(
        self, prompt: Prompt, params: SamplingParams
    ) -> AsyncGenerator[Collector, None]:
        """Yield the collector of one request each time it has news."""
        client, reader = await self._connected()
        if isinstance(prompt, str) and len(prompt) > PIECE:  # other calls go on meanwhile
            collector = await asyncio.to_thread(reader.collector, prompt, params)
        else:
            collector = reader.collector(prompt, params)
        async with aclosing(client.submit(collector.request)) as deltas:
            async for delta in deltas:
                if collector.take(delta):
                    client.abort(delta.request_id, delta.choice)
                yield collector
        collector.result()  # raises where the request failed

    async def _connected(self) -> tuple[ProcessClient, PromptReader]:
        require_own(self._pid, "AsyncLLM")
        if self._closed:
            raise RuntimeError("this AsyncLLM is closed")
        loop = asyncio.get_running_loop()
        if self._client is None:
            self._client, self._loop = ProcessClient(self._process), loop
        if self._loop is not loop:
            raise RuntimeError(
                "this AsyncLLM belongs to the event loop of its first call, and this is another: "
                "make all calls in one asyncio.run, or an AsyncLLM in each"
            )
        await self._client.ready()
        if self._reader is None:
            self._reader = PromptReader(self._client.info, self._chat_template)
        return self._client, self._reader
