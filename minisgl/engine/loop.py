"""Runs one engine on the messages it receives, until it is drained or fails."""

import time
from collections.abc import Callable
from itertools import groupby

from minisgl.core.executor import Failed, Profiled
from minisgl.engine.engine import Engine
from minisgl.engine.messages import (
    Abort,
    Deltas,
    Drain,
    FromEngine,
    Ready,
    Rejected,
    StartProfile,
    Status,
    StopProfile,
    Submit,
    ToEngine,
)
from minisgl.log import get_logger

IDLE_HEARTBEAT = 1.0  # seconds between status messages while there is no work
HEARTBEAT = 0.5  # seconds between status messages, at least, while there is

Receive = Callable[[float], list[ToEngine]]
Send = Callable[[FromEngine], None]

log = get_logger(__name__)


def drive(build: Callable[[], Engine], receive: Receive, send: Send) -> bool:
    """Build the engine, serve its inbox until drained, close it. True unless the engine failed.

    Whatever ends it but a drain, the last message is `Failed`, with the reason.

    `receive(timeout)` blocks for at most `timeout` seconds while there is no message, and returns
    all that have come.
    """
    try:
        engine = build()
    except Exception as error:
        # What was given is refused in a line; whoever debugs sees where.
        refused = isinstance(error, ValueError | OSError)
        (log.debug if refused else log.error)("the engine could not be built", exc_info=error)
        send(Failed(str(error) if refused else f"{type(error).__name__}: {error}"))
        return False
    send(Ready(engine.info))
    failure = None
    try:
        _Loop(engine, receive, send).run()
    except Exception as error:
        log.exception("the engine's loop ended with an error")
        failure = f"{type(error).__name__}: {error}"
    failure = engine.failure or failure
    if failure is not None:
        send(Failed(failure))  # before the device is released, which may take long, or fail too
    try:
        engine.close()
    except Exception:  # what was said is still on its way
        log.exception("the engine could not be closed")
        return False
    return failure is None


class _Loop:
    def __init__(self, engine: Engine, receive: Receive, send: Send) -> None:
        self._engine = engine
        self._receive = receive
        self._send = send
        self._deadline: float | None = None  # of a drain, once one is asked for
        self._busy = False
        self._reported = 0.0

    def run(self) -> None:
        engine = self._engine
        while engine.failure is None:
            busy = engine.has_work()
            self._report(busy)
            if not busy and self._deadline is not None:
                return
            for message in self._receive(0.0 if busy else IDLE_HEARTBEAT):
                self._handle(message)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                engine.abort_all()
            self._report(engine.has_work())  # before a step that may be long
            # Log-probabilities of prompts alone, or the message of a step might have megabytes.
            for _, deltas in groupby(engine.step(), lambda d: d.prompt_logprobs and id(d)):
                self._send(Deltas(list(deltas)))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit(request) if self._engine.failure or self._deadline is not None:
                reason = self._engine.failure or "the engine is shutting down"
                self._send(Rejected(request.id, reason, stopped=True))
            case _ if self._engine.failure:
                pass  # `Failed`, which comes next, answers it
            case Submit(request):
                try:
                    self._engine.add(request)
                except ValueError as error:
                    self._send(Rejected(request.id, str(error)))
            case Abort(request_id, choice):
                self._engine.abort(request_id, choice)
            case Drain(timeout):
                self._deadline = time.monotonic() + timeout
            case StartProfile(num_steps, traces):
                self._profile(lambda: [self._engine.start_profile(num_steps, traces=traces)])
            case StopProfile():
                self._profile(self._engine.stop_profile)

    def _profile(self, change: Callable[[], list[str]]) -> None:
        self._report(busy=True)  # writing files may take as long as a step
        try:
            self._send(Profiled(change()))
        except ValueError as error:
            self._send(Profiled([], str(error)))
        except RuntimeError:
            if self._engine.failure is None:
                raise

    def _report(self, busy: bool) -> None:
        now = time.monotonic()
        if busy != self._busy or now >= self._reported + HEARTBEAT:
            self._busy, self._reported = busy, now
            self._send(Status(busy, self._engine.stats()))
