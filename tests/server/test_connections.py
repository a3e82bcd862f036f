"""Connections: what clients may send, how slowly, how many they are; those that are half closed."""

import json
import re
import socket
import time
from contextlib import ExitStack, closing

import httpx
import pytest

from minisgl.server.connections import Bounds, HttpServer
from tests.server.calls import eventually
from tests.server.fake_engine import ServerThread

HEAD_BYTES = 2000
SECONDS = 0.4  # for headers, and for a body
IDLE_SECONDS = 2
CONNECTIONS = 12
JSON = "Host: x\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def bounded():
    bounds = Bounds(
        connections=CONNECTIONS,
        idle_seconds=IDLE_SECONDS,
        head_bytes=HEAD_BYTES,
        head_seconds=SECONDS,
        body_seconds=SECONDS,
    )
    with closing(ServerThread(bounds)) as server:
        yield server


@pytest.fixture
def server(bounded):
    bounded.engine.reset()
    return bounded


def connect(server) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def rest(raw: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    found = b""
    while piece := raw.recv(1 << 16):
        found += piece
    return found


def refusal(raw: socket.socket) -> tuple[int, str]:
    """Status and message of the one answer that comes before the connection ends."""
    head, _, body = rest(raw).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    return int(head.split()[1]), error["message"]


def call(path="/v1/completions", version="1.1", **fields) -> bytes:
    content = json.dumps({"prompt": "x", "ignore_eos": True, "max_tokens": 8} | fields).encode()
    head = f"POST {path} HTTP/{version}\r\n{JSON}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


# ---- sizes --------------------------------------------------------------------------------------


def head_of(size: int) -> bytes:
    """A request without a body, of `size` bytes."""
    return HEALTH + b"x: " + b"y" * (size - len(HEALTH) - 7) + b"\r\n\r\n"


def test_headers_may_have_so_many_bytes_and_no_more(server):
    for size, status in ((HEAD_BYTES, 200), (HEAD_BYTES + 1, 431)):
        for piece in (size, 300):
            with connect(server) as raw:
                head = head_of(size)
                assert len(head) == size
                for start in range(0, size, piece):
                    raw.sendall(head[start : start + piece])
                    time.sleep(0.01)
                assert int(raw.recv(100).split()[1]) == status


@pytest.mark.parametrize(
    "head",
    [
        HEALTH + b"x: " + b"y" * 3_000_000,
        HEALTH + b"x: y\r\n" * 200_000,
        b"GET /" + b"x" * 3_000_000,
        b"G" * 3_000_000,
        call()[:60] + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 3_000_000,
    ],
    ids=["a long header", "many headers", "a long path", "a long method", "a chunk's extension"],
)
def test_what_is_too_long_is_refused_before_it_is_all_there(server, head):
    with connect(server) as raw:
        raw.sendall(head)  # all of it is taken, so that the client comes to read the answer
        status, message = refusal(raw)
    assert status == 431
    assert str(HEAD_BYTES) in message


def test_trailers_count_as_headers(server):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server) as raw:
        raw.sendall(head + b"1\r\n{\r\n0\r\n" + b"x: y\r\n" * 200_000)
        assert refusal(raw)[0] == 431


def test_what_is_no_http_is_refused_in_openais_shape(server):
    for garbage in (b"\x16\x03\x01 hello\r\n\r\n", b"\r\n", b"GET / HTTP/1.1\r\nx y\r\n\r\n"):
        with connect(server) as raw:
            raw.sendall(garbage)
            assert refusal(raw) == (400, "the request is not valid HTTP")


def test_what_comes_behind_the_last_request_changes_nothing(server):
    """Some old clients end a body by an empty line."""
    server.engine.delay = 0.05
    with connect(server) as raw:
        raw.sendall(call(version="1.0") + b"\r\n")
        time.sleep(0.1)
        raw.sendall(b"\r\n")
        assert rest(raw).startswith(b"HTTP/1.1 200")


# ---- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (HEALTH, f"the headers of a request must be sent within {SECONDS} s"),
        (b"G", f"the headers of a request must be sent within {SECONDS} s"),
        (call()[:-1], f"the body of a request must be sent within {SECONDS} s"),
        (HEALTH + b"Content-Length: 0\r\n\r\n" + b"G", "the headers"),  # the second request's
    ],
    ids=["headers", "a byte", "body", "a second request"],
)
def test_half_a_request_is_refused_after_its_time(server, sent, words):
    with connect(server) as raw:
        before = time.monotonic()
        raw.sendall(sent)
        got = rest(raw)
        assert SECONDS * 0.9 < time.monotonic() - before < 15
    assert got.count(b"HTTP/1.1 408 ") == 1
    assert words.encode() in got


@pytest.mark.parametrize(
    ("sent", "trickle"),
    [(HEALTH, b"x: y\r\n"), (call(pad="x" * 900)[:-900], b" ")],
    ids=["headers", "body"],
)
def test_a_trickle_wins_no_time(server, sent, trickle):
    with connect(server) as raw:
        before = time.monotonic()
        raw.sendall(sent)
        while time.monotonic() < before + 10 and not has_come(raw):
            raw.sendall(trickle)
            time.sleep(0.05)
        assert refusal(raw)[0] == 408


def has_come(raw: socket.socket) -> bool:
    raw.setblocking(False)
    try:
        return bool(raw.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        raw.settimeout(20)


def test_a_call_whose_body_does_not_come_ends_with_its_connection(server):
    name = 'minisgl_requests_total{endpoint="completions",outcome="disconnected"}'

    def count():
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = count()
    with connect(server) as raw:
        raw.sendall(call()[:-1])
        assert refusal(raw)[0] == 408
        assert eventually(lambda: count() == before + 1)


@pytest.mark.parametrize("first", [b"", HEALTH + b"\r\n"], ids=["new", "used"])
def test_a_silent_connection_is_closed_without_an_answer(server, first):
    with connect(server) as raw:
        raw.sendall(first)
        before = time.monotonic()
        assert rest(raw).count(b"HTTP/1.1") == bool(first)
        assert IDLE_SECONDS * 0.9 < time.monotonic() - before < 15


def test_an_answer_may_take_longer_than_all_of_these(server):
    server.engine.delay = 0.4
    with connect(server) as raw:
        raw.sendall(call() + HEALTH[:9])  # half of the next request waits with it
        assert raw.recv(100).startswith(b"HTTP/1.1 200")


# ---- how many -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", HEALTH, call()[:-1]], ids=["silent", "headers", "body"])
def test_too_many_connections_close_those_that_waited_longest(server, sent):
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(server)) for _ in range(CONNECTIONS + 5)]
        for raw in crowd:
            raw.sendall(sent)
        with connect(server) as raw:
            raw.sendall(HEALTH + b"\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        answer = crowd[0].recv(1000)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert f"at most {CONNECTIONS} connections".encode() in answer


def test_connections_with_requests_under_way_are_kept(server):
    server.engine.delay = 0.3
    with ExitStack() as stack:
        busy = [stack.enter_context(connect(server)) for _ in range(CONNECTIONS)]
        for raw in busy:
            raw.sendall(call(stream=True))
        assert eventually(lambda: len(server.engine.running) == CONNECTIONS)
        with connect(server) as late:
            assert late.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert len(server.engine.running) == CONNECTIONS
        for raw in busy:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_refusals_are_logged_but_not_each(server, caplog):
    http = HttpServer(server.api.app, Bounds(), "critical")
    for number in range(20):
        http.tell(f"refusal {number}")
    assert caplog.messages == ["refusal 0 (no more of this is logged for 10 s)"]


# ---- versions and halves ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_http_1_0_client_gets_a_body_without_chunks(server, stream):
    with connect(server) as raw:
        raw.sendall(call(version="1.0", stream=stream))
        head, _, body = rest(raw).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    if stream:
        assert body.startswith(b'data: {"')
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert len(body) == int(re.search(rb"content-length: (\d+)", head.lower())[1])
        assert json.loads(body)["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_half_gets_its_answer(server, stream):
    server.engine.delay = 0.2
    with connect(server) as raw:
        raw.sendall(call(stream=stream))
        raw.shutdown(socket.SHUT_WR)
        *skipped, answer = rest(raw).split(b"HTTP/1.1 ")[1:]
    assert 0 < len(skipped) <= 3
    assert all(probe == b"100 Continue\r\n\r\n" for probe in skipped)
    assert answer.startswith(b"200 OK")
    assert (b"data: [DONE]" if stream else b'"choices"') in answer
    assert server.engine.aborted == []


def test_requests_in_a_row_are_all_answered_to_a_half_closed_client(server):
    with connect(server) as raw:
        raw.sendall(call() + call() + HEALTH + b"\r\n")
        raw.shutdown(socket.SHUT_WR)
        assert rest(raw).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("sent", [b"", HEALTH, call()[:-1]], ids=["silent", "headers", "body"])
def test_half_a_request_and_no_more_ends_at_once(server, sent):
    with connect(server) as raw:
        before = time.monotonic()
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        assert rest(raw) == b""
        assert time.monotonic() - before < SECONDS
