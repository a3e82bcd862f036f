"""The HTTP server: OpenAI's endpoints, health, metrics. A client that hangs up aborts its call."""

import asyncio
import ctypes
import re
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minisgl.engine.client import EngineDeadError, ProcessClient
from minisgl.log import get_logger
from minisgl.server import fields
from minisgl.server.body import ApiError, cut, read, shown
from minisgl.server.calls import Call, ServedModel, check_answer, unknown_model
from minisgl.server.chat import parse_chat
from minisgl.server.completions import parse_completion
from minisgl.server.generate import Generation, Part, engine_failed
from minisgl.server.metrics import CallClock, Metrics
from minisgl.server.replies import Reply
from minisgl.server.response_reply import ResponseReply
from minisgl.server.responses import parse_response

MAX_BODY_BYTES = 16 * 2**20
AMBIGUOUS = "ambiguous_length"
LONG_BODY_BYTES = 8192  # longer ones are parsed and tokenized off the event loop

LONG_ANSWER = 256  # tokens with log-probabilities; more are written off the event loop
LONG_TEXT = 2**15  # characters of an answer, likewise
HUGE_BODY_BYTES = 2**18  # these one at a time, and the memory they took is given back

T = TypeVar("T")
AnyReply = Reply | ResponseReply
Parse = Callable[[bytes, ServedModel], Call]

logger = get_logger(__name__)


class ProfileBody(msgspec.Struct):
    """What /profile/start takes, if it is given a body."""

    num_steps: int | None = None
    traces: bool = True


class Api:
    """The endpoints of one engine. `app` may listen at once; it answers 503 until `open`."""

    def __init__(self, engine: ProcessClient) -> None:
        self.metrics = Metrics(engine)
        self._engine = engine
        self._model: ServedModel | None = None
        self._huge = asyncio.Lock()  # held for a huge body
        self.app = Starlette()
        self.app.add_route("/v1/chat/completions", self.chat, ["POST"])
        self.app.add_route("/v1/completions", self.completions, ["POST"])
        self.app.add_route("/v1/responses", self.responses, ["POST"])
        self.app.add_route("/v1/models", self.models)
        self.app.add_route("/v1/models/", self.models)  # before the next, which it would match
        self.app.add_route("/v1/models/{name:path}", self.model_by_name)
        self.app.add_route("/health", self.health)
        self.app.add_route("/metrics", self.metrics_text)
        self.app.add_route("/profile/start", self.start_profile, ["POST"])
        self.app.add_route("/profile/stop", self.stop_profile, ["POST"])
        self.app.add_exception_handler(ApiError, _api_error)
        self.app.add_exception_handler(HTTPException, _http_error)
        self.app.add_exception_handler(Exception, _unexpected_error)

    def open(self, model: ServedModel) -> None:
        """Serve `model` from now on: the engine is loaded and warm."""
        self._model = model

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat", parse_chat)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, "completions", parse_completion)

    async def responses(self, request: Request) -> Response:
        return await self._answer(request, "responses", parse_response)

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [_model_json(self._served())]})

    async def model_by_name(self, request: Request) -> Response:
        model, name = self._served(), request.path_params["name"].removesuffix("/")
        if name != model.name:
            raise unknown_model(name, model.name)
        return _json(_model_json(model))

    async def health(self, _: Request) -> Response:
        """200 only where a request would be served: the engine warm and its loop alive."""
        health = self._engine.health()
        state = "starting" if health.ok and self._model is None else health.state
        ready = state == "ready"
        return _json({"status": state, "reason": health.reason}, 200 if ready else 503)

    async def metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def start_profile(self, request: Request) -> Response:
        self._served()
        asked = read(await _read_body(request) or b"{}", ProfileBody, {})
        with _profile_errors():
            directory = await self._engine.start_profile(asked.num_steps, traces=asked.traces)
            return _json({"directory": directory})

    async def stop_profile(self, request: Request) -> Response:
        self._served()
        read(await _read_body(request) or b"{}", fields.Empty, {})
        with _profile_errors():
            return _json({"files": await self._engine.stop_profile()})

    def _served(self) -> ServedModel:
        if self._model is None:
            raise engine_failed(self._engine.health().reason or "the model is being loaded", 503)
        return self._model

    async def _answer(self, request: Request, endpoint: str, parse: Parse) -> Response:
        outcome = self.metrics.requests.labels
        try:
            model, clock = self._served(), CallClock(self.metrics)
            call = await self._parse(await _read_body(request), parse, model)
            generation = Generation(call, self._engine, model.tokenizer)
            reply = (ResponseReply if call.kind == "response" else Reply)(call, model.tokenizer)
            if call.stream:
                parts = generation.parts()
                # Until the first part, a refusal can still set the status of the answer.
                first = await unless_disconnected(request.receive, _next(parts))
                events = self._events(endpoint, first, parts, generation, reply, clock)
                return _EventStream(events, parts)
            work = _collect(generation, reply, clock)
            whole = await unless_disconnected(request.receive, work)
            clock.end(generation.usage)
            outcome(endpoint, "ok").inc()
            return _json(whole)
        except ApiError as error:
            outcome(endpoint, "refused" if error.status < 500 else "failed").inc()
            raise
        except ClientDisconnect:
            outcome(endpoint, "disconnected").inc()
            return Response(status_code=499)  # the connection is closed
        except Exception as error:  # an answer here keeps the connection open
            outcome(endpoint, "failed").inc()
            logger.exception("a %s call failed with an unexpected error", endpoint)
            raise _internal_error() from error

    async def _parse(self, body: bytes, parse: Parse, model: ServedModel) -> Call:
        if len(body) <= LONG_BODY_BYTES:
            return parse(body, model)
        if len(body) <= HUGE_BODY_BYTES:
            return await asyncio.to_thread(parse, body, model)
        async with self._huge:
            try:
                return await asyncio.to_thread(parse, body, model)
            finally:
                trim = threading.Thread(target=_give_back_memory, daemon=True)
                asyncio.get_running_loop().call_later(1, trim.start)  # once it has been answered

    async def _events(
        self,
        endpoint: str,
        first: Part | None,
        parts: AsyncGenerator[Part, None],
        generation: Generation,
        reply: AnyReply,
        clock: CallClock,
    ) -> AsyncGenerator[bytes, None]:
        """The server-sent events of a call whose first part is there."""
        ended = "disconnected"
        try:
            part = first
            while part is not None:
                clock.part(part)
                if events := reply.events(part, generation.usage):
                    yield events
                part = await _next(parts)
            clock.end(generation.usage)
            ended = "ok"
            yield reply.end(generation.usage)
        except ApiError as error:
            ended = "failed"
            yield reply.failure(error.body)
        except Exception:
            ended = "failed"
            logger.exception("call %s failed with an unexpected error", generation.call.id)
            yield reply.failure(_internal_error().body)
        finally:
            self.metrics.requests.labels(endpoint, ended).inc()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client hangs up first: cancels it, raises ClientDisconnect."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events; closed as soon as the client hangs up, not at the next event."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]
    ) -> None:
        headers = {"cache-control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._source = source  # the parts that events are made of, closed with them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source), aclosing(self._events):
            with suppress(ClientDisconnect):
                await unless_disconnected(receive, self.stream_response(send))


async def _collect(generation: Generation, reply: AnyReply, clock: CallClock) -> dict[str, Any]:
    """The body of an answer that is not streamed. Each choice is written as soon as it is whole."""
    parts: dict[int, list[Part]] = {}
    written: dict[int, msgspec.Raw] = {}
    call, num_scored = generation.call, 0
    async with aclosing(generation.parts()) as news:
        async for part in news:
            clock.part(part)
            num_scored += len(part.scored)
            check_answer(num_scored, call.params.logprobs, call.kind)
            parts.setdefault(part.choice, []).append(part)
            if part.finish_reason is None:
                continue
            found = parts.pop(part.choice)
            if (
                sum(len(each.scored) for each in found) < LONG_ANSWER
                and sum(len(each.text) for each in found) < LONG_TEXT
            ):
                written[part.choice] = reply.choice(found)
            else:
                written[part.choice] = await asyncio.to_thread(reply.choice, found)
    return reply.whole((written[choice] for choice in sorted(written)), generation.usage)


async def _next(parts: AsyncGenerator[Part, None]) -> Part | None:
    return await anext(parts, None)


async def _read_body(request: Request) -> bytes:
    """The body. One too long is read to its end but not kept: a client reads no answer before.

    It must say that it is JSON: any web page may make its reader's browser send other bodies.
    """
    if {"content-length", "transfer-encoding"} <= {*request.headers}:
        message = "a request must have Content-Length or Transfer-Encoding, got both"
        raise ApiError(message, code=AMBIGUOUS)
    chunks: list[bytes] = []
    length = 0
    async for chunk in request.stream():
        length += len(chunk)
        if length <= MAX_BODY_BYTES:
            chunks.append(chunk)
        else:
            chunks.clear()
    if length > MAX_BODY_BYTES:
        message = f"the body must have at most {MAX_BODY_BYTES} bytes, got {length}"
        raise ApiError(message, status=413, code="body_too_large")
    body, kind = b"".join(chunks), request.headers.get("content-type", "")
    if body and kind.partition(";")[0].strip().lower() != "application/json":
        message = f"Content-Type must be application/json, got {shown(kind)}"
        raise ApiError(message, status=415, code="unsupported_media_type")
    return body


def _give_back_memory() -> None:
    """Return freed memory to the system, where the C library would keep it for later (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@contextmanager
def _profile_errors() -> Generator[None, None, None]:
    try:
        yield
    except ValueError as error:
        field = re.match(r"\w+", str(error))
        raise ApiError(str(error), param=field and field[0]) from error
    except EngineDeadError as error:
        raise engine_failed(str(error), 503) from error


def _model_json(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "minisgl",
        "max_model_len": model.limits.max_context,
        "sampling_defaults": model.sampling_defaults,
    }


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _internal_error() -> ApiError:
    return ApiError(
        "internal error; the server's log says what failed", status=500, type="server_error"
    )


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    response = _json(error.body, error.status)
    if error.body["error"]["code"] == AMBIGUOUS:  # a proxy may see another end of the request
        response.headers["connection"] = "close"
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {cut(request.url.path)}"
    if error.status_code == 404 and not request.url.path.startswith("/v1/"):
        message += "; the paths of OpenAI's API begin with /v1/"
    response = _json(ApiError(message).body, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _unexpected_error(_: Request, error: Exception) -> Response:
    """Starlette raises `error` again after this answer, so that it is logged."""
    return _json(_internal_error().body, 500)
