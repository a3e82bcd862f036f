"""HTTP itself: kinds of bodies, their lengths, paths; refusals reach the client as such."""

import re
import socket

import httpx
import pytest

from minisgl.server.app import MAX_BODY_BYTES
from tests.server.calls import USER
from tests.server.fake_engine import CONTEXT


def test_refusals_over_http(server):
    url = f"{server.url}/v1/chat/completions"
    response = httpx.post(url, content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body is not valid JSON")
    response = httpx.post(url, json={"messages": USER, "stream": True, "n": 0})
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["param"] == "n"
    assert server.engine.requests == []


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions", "profile/start"])
@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("text/plain", False),
        ("text/plain;charset=UTF-8", False),
        ("application/x-www-form-urlencoded", False),
        ("multipart/form-data; boundary=x", False),
        (None, False),
        ("application/json", True),
        ("Application/JSON ; charset=utf-8", True),
    ],
)
def test_a_body_that_any_web_page_could_send_is_refused(server, path, kind, taken):
    headers = {} if kind is None else {"content-type": kind}
    response = httpx.post(f"{server.url}/{path}", content=b"{", headers=headers)
    error = response.json()["error"]
    if taken:
        assert response.status_code == 400  # read, and no JSON
        return
    assert response.status_code == 415
    assert error["code"] == "unsupported_media_type"
    assert error["message"].startswith("Content-Type must be application/json, got ")
    assert (kind or '""') in error["message"]


def test_a_long_path_is_not_repeated(server):
    for path, status in (("/v1/models/", 404), ("/v2/", 404), ("/v1/completions/", 404)):
        response = httpx.get(f"{server.url}{path}{'x' * 20_000}")
        assert response.status_code == status
        assert len(response.text) < 300


def test_a_body_that_is_too_long_is_refused_with_both_numbers(server):
    content = b" " * (MAX_BODY_BYTES + 1)
    response = httpx.post(f"{server.url}/v1/completions", content=content)
    assert response.status_code == 413
    message = response.json()["error"]["message"]
    assert str(MAX_BODY_BYTES) in message
    assert str(MAX_BODY_BYTES + 1) in message


def test_a_body_with_two_lengths_is_refused_and_nothing_behind_it_is_read(server):
    url = httpx.URL(server.url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    both = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    with socket.create_connection((url.host, url.port), timeout=20) as raw:
        raw.sendall(head + both + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"HTTP/1.1 400 ") == 1
    assert b"ambiguous_length" in answer
    assert b"connection: close" in answer.lower()


def test_a_long_body_is_served_like_a_short_one(server):
    prompt = "a" * 20000
    body = {"prompt": prompt, "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    least = int(re.search(r"prompt has at least (\d+) tokens", error["message"])[1])
    assert CONTEXT < least <= len(server.model.tokenizer.encode(prompt))
