"""Clients of an engine in its own process: submit requests, iterate over deltas, abort.

A client belongs to one asyncio loop and routes what the engine sends to the waiting calls.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from minisgl.core.executor import Failed, Profiled
from minisgl.core.request import Delta, Request
from minisgl.engine.loop import IDLE_HEARTBEAT
from minisgl.engine.messages import (
    Abort,
    Deltas,
    Drain,
    EngineInfo,
    EngineStats,
    FromEngine,
    Ready,
    Rejected,
    StartProfile,
    Status,
    StopProfile,
    Submit,
    ToEngine,
)
from minisgl.engine.process import EngineProcess
from minisgl.log import get_logger

IDLE_TIMEOUT = 10 * IDLE_HEARTBEAT  # seconds without a message; then an idle engine is stuck
STEP_TIMEOUT_FACTOR = 10  # a busy engine is stuck after so many times its longest step so far
EXIT_WAIT_SECONDS = 5.0  # for an engine to exit once drained, before it is killed
LOOK_SECONDS = 0.5  # between two looks at whether the engine is stuck

log = get_logger(__name__)


class EngineDeadError(RuntimeError):
    """The engine has ended or does not accept requests; the message says why."""


class Health(msgspec.Struct, frozen=True):
    """Whether the engine serves: only in state "ready"."""

    state: Literal["starting", "ready", "stuck", "draining", "dead"]
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "ready"


class _Stream:
    """The deltas of one request on their way to its consumer."""

    def __init__(self, choices: int) -> None:
        self.open = set(range(choices))  # choices whose end has not been yielded
        self.queue: asyncio.Queue[Delta | Rejected | None] = asyncio.Queue()


class ProcessClient:
    """Speaks ZeroMQ to `process`. Create it inside the asyncio loop it lives in, which calls it."""

    def __init__(self, process: EngineProcess, *, watchdog_timeout: float = 60.0) -> None:
        self._watchdog_timeout = watchdog_timeout
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._died: asyncio.Future[str] = self._loop.create_future()
        self._streams: dict[str, _Stream] = {}
        self._profiles: deque[asyncio.Future[list[str]]] = deque()  # asked for, in order
        self._closing = False
        self._last: Status | None = None
        self._heard = time.monotonic()
        self._process = process
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._socket = zmq.asyncio.Socket.from_socket(process.socket)
        self._exited = asyncio.Event()
        self._receiving = self._loop.create_task(self._receive_all())
        self._watching = self._loop.create_task(self._watch())
        self._looking = self._loop.create_task(self._end_what_waits_while_stuck())
        process.on_exit(self._on_exit)

    @property
    def info(self) -> EngineInfo:
        """What is served. Raises EngineDeadError before `ready()` has returned."""
        if not self._started.done():
            raise EngineDeadError("the engine has not started yet")
        return self._started.result()

    async def ready(self) -> None:
        """Wait until the engine is loaded and warm. Raises EngineDeadError if it never will be."""
        await asyncio.shield(self._started)

    async def failed(self) -> str:
        """Wait until the engine has died without being asked to; return why."""
        return await asyncio.shield(self._died)

    def stats(self) -> EngineStats | None:
        """The counters last reported, at most about a second old; None before the first."""
        return self._last.stats if self._last else None

    def health(self) -> Health:
        if self._died.done():
            return Health("dead", self._died.result())
        if self._closing:
            return Health("draining", "the engine is shutting down")
        if not self._started.done():
            return Health("starting", "the model is being loaded")
        limit = min(IDLE_TIMEOUT, self._watchdog_timeout)
        if self._last is not None and self._last.busy:
            long_step = STEP_TIMEOUT_FACTOR * self._last.stats.longest_step
            limit = max(self._watchdog_timeout, long_step)
        silence = time.monotonic() - self._heard
        if silence > limit:
            return Health("stuck", f"the engine has made no progress for {silence:.1f} s")
        return Health("ready")

    def _require_engine(self) -> None:
        health = self.health()
        if not health.ok:
            raise EngineDeadError(health.reason)

    async def submit(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Send `request` at the first iteration; yield the deltas of all its choices as they come.

        Its id must be new: late deltas of an earlier request would be taken for this one's.
        Ends when every choice has finished or been aborted. Closing the generator early (or
        cancelling its consumer) aborts the request. Raises ValueError when the engine refuses the
        request, EngineDeadError when there is no engine to take it or it is stuck; an engine that
        fails or gets stuck later yields a delta with `finish_reason="error"` for every choice that
        was running.
        """
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is already in use")
        self._require_engine()
        stream = self._streams[request.id] = _Stream(request.params.n)
        try:
            self._send(Submit(request))
            while stream.open:
                item = await stream.queue.get()
                if isinstance(item, Rejected):
                    stream.open.clear()
                    raise (EngineDeadError if item.stopped else ValueError)(item.reason)
                if item is None or item.choice not in stream.open:
                    continue
                if item.finish_reason is not None:
                    stream.open.discard(item.choice)
                yield item
        finally:
            self._streams.pop(request.id, None)
            if stream.open:
                self._send(Abort(request.id, None))

    async def start_profile(self, num_steps: int | None = None, *, traces: bool = True) -> str:
        """Profile the next `num_steps` steps, or all until `stop_profile`; returns the directory
        that the files will be in. Without `traces` there is the step timeline alone.

        Raises ValueError, naming the field, where there is no profile_dir, a profile is running
        already or `num_steps` is below 1; EngineDeadError when there is no engine to do it.
        """
        (directory,) = await self._profile(StartProfile(num_steps, traces))
        return directory

    async def stop_profile(self) -> list[str]:
        """End the profile; returns its files: the step timeline, then a trace of each rank.

        Raises ValueError where none is running or its files cannot be written.
        """
        return await self._profile(StopProfile())

    async def _profile(self, question: StartProfile | StopProfile) -> list[str]:
        self._require_engine()
        answer: asyncio.Future[list[str]] = self._loop.create_future()
        self._profiles.append(answer)
        self._send(question)
        return await answer

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a choice, or the whole request; nothing more is yielded for it. Unknown: no-op."""
        stream = self._streams.get(request_id)
        ended = {choice} if choice is not None else set(stream.open if stream else ())
        if stream is None or not ended & stream.open:
            return
        stream.open -= ended
        stream.queue.put_nowait(None)  # wakes a consumer with nothing left to wait for
        self._send(Abort(request_id, choice))

    def _receive(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        match message:
            case Deltas(deltas):
                for delta in deltas:
                    self._route(delta.request_id, delta)
            case Rejected(request_id):
                self._route(request_id, message)
            case Status():
                self._last = message
            case Profiled(paths, refusal):
                self._profiled(paths, refusal)
            case Ready(info):
                self._started.set_result(info)
            case Failed(reason):
                self._fail(reason)

    def _route(self, request_id: str, item: Delta | Rejected) -> None:
        if stream := self._streams.get(request_id):
            stream.queue.put_nowait(item)

    def _profiled(self, paths: list[str], refusal: str | None) -> None:
        answer = self._profiles.popleft()
        if answer.done():  # the caller was cancelled
            return
        if refusal is None:
            answer.set_result(paths)
        else:
            answer.set_exception(ValueError(refusal))

    def _fail(self, reason: str) -> None:
        """The engine has ended: end everything that waits for it with an error."""
        if self._died.done():
            return
        if not self._closing:
            self._died.set_result(reason)
        if not self._started.done():
            self._started.set_exception(EngineDeadError(reason))
            self._started.exception()  # retrieved, so that asyncio logs no warning
        self._end_all(reason)

    def _end_all(self, reason: str) -> None:
        """End everything that waits for an answer with an error."""
        for answer in self._profiles:  # they stay: a stuck engine that goes on answers in order
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
        for request_id, stream in self._streams.items():
            for choice in stream.open:
                delta = Delta(request_id, choice, [], finish_reason="error", error=reason)
                stream.queue.put_nowait(delta)
        self._streams.clear()  # what may still come for them is dropped

    async def _end_what_waits_while_stuck(self) -> None:
        """Requests that a stuck engine has are aborted, so that it does not go on with them."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            # While this process stood still as well, it could hear nothing.
            self._heard = min(now, self._heard + max(0.0, now - before - LOOK_SECONDS))
            health = self.health()
            if health.state != "stuck":
                continue
            if self._streams:
                log.error("%s: %d requests get an error", health.reason, len(self._streams))
            for request_id in self._streams:
                self._send(Abort(request_id, None))
            self._end_all(health.reason)

    def _on_exit(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nothing waits
            self._loop.call_soon_threadsafe(self._exited.set)

    def _send(self, message: ToEngine) -> None:
        """Send a message; it is lost if the engine has ended."""
        if not self._exited.is_set():
            sent = self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
            # A lost message needs no error: the process has ended, which `_watch` reports.
            asyncio.ensure_future(sent).add_done_callback(_forget)

    async def _receive_all(self) -> None:
        while True:
            self._receive(self._decoder.decode(await self._socket.recv()))
            await asyncio.sleep(0)  # where the next message is there already, `recv` does not wait

    async def _watch(self) -> None:
        await self._exited.wait()
        while await self._socket.poll(50):  # messages sent before it ended may still arrive
            await asyncio.sleep(0)
        self._receiving.cancel()
        self._looking.cancel()
        self._fail(self._process.exit_reason("the engine process"))

    async def close(self, drain_timeout: float = 0.0) -> None:
        """Finish what runs within `drain_timeout` seconds, abort the rest, stop. Idempotent."""
        if not self._closing:
            self._closing = True
            if self._started.done() and not self._exited.is_set():
                self._send(Drain(drain_timeout))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._exited.wait(), drain_timeout + EXIT_WAIT_SECONDS)
            self._process.kill()
        await self._watching
        self._socket.close(linger=0)
        self._process.close()


def _forget(sent: asyncio.Future[zmq.MessageTracker | None]) -> None:
    """Read the result of a send, so that asyncio does not log its exception as never retrieved."""
    if not sent.cancelled():
        sent.exception()
