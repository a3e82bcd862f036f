"""Connections: uvicorn's HTTP, with bounds on what clients send, how slowly, and how many they are.

uvicorn waits for the rest of a request for ever. Here every part of one has its time, and where
there are too many connections, the one that has waited longest for its client is closed. A client
that closes its sending half behind a request gets its answer.
"""

import asyncio
import resource
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from minisgl.log import get_logger
from minisgl.server.body import ApiError

MAX_CONNECTIONS = 16_384
OTHER_DESCRIPTORS = 128  # of this process: files, and sockets that are no clients' connections
LINGER_SECONDS = 2.0  # a refused client may still be sending: closed at once, it reads no answer
LOG_SECONDS = 10.0  # between two log lines about refusals
PROBE_SECONDS = (0.0, 0.25, 2.0)  # after a client closed its half, to see whether it is there

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a client may take of the server. Sizes in bytes, times in seconds."""

    connections: int = MAX_CONNECTIONS
    idle_seconds: int = 60  # without a request: longer than clients keep connections
    head_bytes: int = 32 * 2**10  # request line and headers together
    head_seconds: float = 20.0
    body_seconds: float = 120.0


class HttpServer(uvicorn.Server):
    """Serves `app` within `bounds`, until `leave`. Whoever runs it handles signals."""

    def __init__(self, app: ASGIApp, bounds: Bounds, log_level: str) -> None:
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(_Connection, server=self)),
            h11_max_incomplete_event_size=bounds.head_bytes - 1,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=log_level,
            timeout_keep_alive=bounds.idle_seconds,
        )
        super().__init__(config)
        self.bounds = bounds
        self.waiting: dict[_Connection, None] = {}  # for their clients, the longest first
        self._told = -LOG_SECONDS

    def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()

    def leave(self, seconds: float) -> None:
        """Accept nothing more, and close what is still open after so many seconds."""
        self.should_exit = True
        asyncio.get_running_loop().call_later(seconds, self._abort)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def make_room(self) -> None:
        """Close the connection that has waited longest for its client, if there are too many."""
        most = self.bounds.connections
        if len(self.server_state.connections) > most:
            longest = next(iter(self.waiting))
            longest.refuse(503, f"there may be at most {most} connections", linger=0)

    def tell(self, what: str) -> None:
        """Log what happened to a connection, unless there was such a line just before."""
        if time.monotonic() >= self._told + LOG_SECONDS:
            log.warning("%s (no more of this is logged for %g s)", what, LOG_SECONDS)
            self._told = time.monotonic()


def connections_within_descriptors() -> int:
    """How many connections there may be, with the process's limit set to what they need."""
    most = MAX_CONNECTIONS + OTHER_DESCRIPTORS
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most - OTHER_DESCRIPTORS)


class _Connection(H11Protocol):
    """One connection. `server` counts it while it waits for its client."""

    def __init__(self, *args: Any, server: HttpServer, **options: Any) -> None:
        super().__init__(*args, **options)
        self._http = server
        self._part = ""  # of a request, what its client owes next
        self._refused = False
        self._is_half_closed = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        self._http.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._http.waiting.pop(self, None)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        while data and not self._refused and self.conn.their_state is not h11.MUST_CLOSE:
            most = len(data)
            if self.conn.their_state is h11.IDLE:  # so much that headers too long are not complete
                most = self._http.bounds.head_bytes - len(self.conn.trailing_data[0])
            super().data_received(data[:most])
            self._watch()
            data = data[most:]

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses."""
        most = self._http.bounds.head_bytes
        if len(self.conn.trailing_data[0]) >= most:
            self.refuse(431, f"request line and headers must have at most {most} bytes together")
        else:
            self.refuse(400, "the request is not valid HTTP")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        if self._is_half_closed and self.conn.their_state is h11.IDLE:
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that has sent its request may close that half; True keeps the other one open."""
        cycle = self.cycle
        if self._refused or cycle is None or cycle.more_body or cycle.response_complete:
            return False
        if cycle.scope["http_version"] == "1.0":  # it knows nothing to probe with
            return False
        self._is_half_closed = True
        for seconds in PROBE_SECONDS:
            self.loop.call_later(seconds, self._probe)
        return True

    def _probe(self) -> None:
        """Find out whether the client has gone, which looks like a half-closed connection.

        "100 Continue" is what every client of HTTP/1.1 skips. Sent to one that has gone, it is
        answered by a reset, which the next one then meets.
        """
        if self.conn.our_state is h11.SEND_RESPONSE and not self.transport.is_closing():
            probe = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(probe))

    def _watch(self) -> None:
        """Give the client its time for what it owes now, if that is something new."""
        part = {h11.IDLE: "request", h11.SEND_BODY: "body"}.get(self.conn.their_state, "")
        if part == "request" and self.conn.trailing_data[0]:
            part = "headers"
        if part == self._part or self._refused:
            return
        self._part = part
        self._stop_timer()
        if not part:
            self._http.waiting.pop(self, None)
            return
        self._http.waiting[self] = None
        bounds = self._http.bounds
        times = {"headers": bounds.head_seconds, "body": bounds.body_seconds}
        seconds = times.get(part, bounds.idle_seconds)
        self._timer = self.loop.call_later(seconds, self._late, seconds)

    def _late(self, seconds: float) -> None:
        if self._part == "request":
            self.transport.close()
        else:
            self.refuse(408, f"the {self._part} of a request must be sent within {seconds:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def refuse(self, status: int, message: str, linger: float = LINGER_SECONDS) -> None:
        """End the connection `linger` seconds after an answer; without one where none is due."""
        self._http.waiting.pop(self, None)
        if self._refused:
            self.transport.close()
            return
        self._refused = True
        self._http.tell(f"a connection ended with {status}: {message}")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Type: application/json\r\n\r\n".encode())
        self.transport.write(msgspec.json.encode(ApiError(message).body))
        self.transport.write_eof()
        self._http.waiting[self] = None
        self._stop_timer()
        self._timer = self.loop.call_later(linger, self.transport.close)
