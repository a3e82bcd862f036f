"""What is no answer: models, health, metrics, clients that hang up, engines that fail."""

import asyncio
import concurrent.futures
import json
import socket

import httpx
import openai
import pytest

from minisgl.engine.client import Health
from minisgl.server.app import Api
from tests.server.calls import MODEL, USER, chat, complete, eventually

JSON = "Host: x\r\nContent-Type: application/json\r\n"

# ---- models, health, metrics --------------------------------------------------------------------


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("some/other")
    assert refusal.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["", f"/{MODEL}"])
def test_models_may_have_a_slash_after_them(server, path):
    there = httpx.get(f"{server.url}/v1/models{path}")
    slash = httpx.get(f"{server.url}/v1/models{path}/", follow_redirects=True)
    assert slash.status_code == there.status_code == 200
    assert slash.json() == there.json()


@pytest.mark.parametrize(
    ("health", "status"),
    [
        (Health("ready"), 200),
        (Health("starting", "the model is being loaded"), 503),
        (Health("stuck", "no progress for 61.0 s"), 503),
        (Health("draining", "shutting down"), 503),
        (Health("dead", "exit code -9"), 503),
    ],
)
def test_health(server, engine, health, status):
    engine.state = health
    response = httpx.get(f"{server.url}/health")
    assert response.status_code == status
    assert response.json() == {"status": health.state, "reason": health.reason}


def test_nothing_is_served_before_the_model_is_there(server, engine):
    transport = httpx.ASGITransport(Api(engine).app)

    async def ask():
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asking:
            health = await asking.get("/health")
            answer = await asking.post("/v1/chat/completions", json={"messages": USER})
            return health, answer, await asking.get("/v1/models")

    health, answer, models = asyncio.run(ask())
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    assert answer.status_code == models.status_code == 503
    assert answer.json()["error"]["code"] == "engine_error"


def figures(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))


def test_metrics_count_calls_and_tokens(server, client, engine):
    def change(name):
        return float(after.get(name, 0)) - float(before.get(name, 0))

    before = figures(server)
    answer = chat(client, n=2)
    list(complete(client, stream=True, max_tokens=2))
    with pytest.raises(openai.BadRequestError):
        chat(client, n=0)
    after = figures(server)
    tokens = answer.usage.completion_tokens
    assert change("minisgl_output_tokens_total") == tokens + 2
    assert change("minisgl_time_to_first_token_seconds_count") == 2
    assert change("minisgl_inter_token_latency_seconds_count") == tokens - 2 + 1
    assert change('minisgl_requests_total{endpoint="chat",outcome="ok"}') == 1
    assert change('minisgl_requests_total{endpoint="completions",outcome="ok"}') == 1
    assert change('minisgl_requests_total{endpoint="chat",outcome="refused"}') == 1
    assert change('minisgl_finished_choices_total{reason="stop"}') == 2
    assert change('minisgl_finished_choices_total{reason="length"}') == 1


# ---- clients that hang up -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", ["one", ["one", "two"]])
def test_a_client_that_hangs_up_aborts_its_call(server, engine, stream, prompts):
    engine.delay = 0.05
    body = {"prompt": prompts, "stream": stream, "ignore_eos": True, "max_tokens": 60}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\n{JSON}Content-Length: {len(content)}\r\n\r\n"
    count = 1 if prompts == "one" else 2
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(head.encode() + content)
        if stream:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: len(engine.running) == count)
    assert eventually(lambda: not engine.running, timeout=1.0)  # long before its 60 tokens
    assert sorted(engine.aborted) == sorted((request.id, None) for request in engine.requests)


def test_a_client_that_hangs_up_while_the_request_waits(server, engine):
    engine.delay = 30.0
    body = json.dumps({"messages": USER, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{JSON}Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(head.encode() + body)
        assert eventually(lambda: len(engine.running) == 1)
    assert eventually(lambda: not engine.running)


def test_a_client_that_hangs_up_before_its_body_is_there(server, caplog):
    def disconnected():
        name = 'minisgl_requests_total{endpoint="completions",outcome="disconnected"}'
        return float(figures(server).get(name, 0))

    before = disconnected()
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    assert eventually(lambda: disconnected() > before)
    assert not caplog.records  # no failure of ours


def test_many_calls_at_once(client, engine):
    engine.delay = 0.001
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: chat(client).choices[0].message.content, range(48)))
    assert set(answers) == {engine.text}


# ---- engines that fail --------------------------------------------------------------------------


def test_the_engines_refusal_is_a_400(client, engine):
    engine.refusal = "prompt has 99 tokens, but the KV pool holds 64"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="99 tokens") as refusal:
            chat(client, stream=stream)
        assert refusal.value.type == "invalid_request_error"


def test_a_dead_engine_is_a_503(client, engine):
    engine.dead = "the engine process ended with exit code -9"
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="exit code -9") as failure:
            chat(client, stream=stream)
        assert failure.value.status_code == 503


def test_a_failure_before_the_first_token_is_a_500(client, engine):
    engine.fail_after = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the device is gone") as failure:
            chat(client, stream=stream)
        assert failure.value.type == "server_error"


def test_one_failing_prompt_ends_all_of_a_call(client, engine):
    """The first to fail decides; what still runs for the call is aborted."""
    submit = engine.submit

    async def second_fails(request):
        if request.id.endswith("-1"):
            raise ValueError("prompt has 99 tokens")
        async for delta in submit(request):
            yield delta

    engine.delay, engine.submit = 0.05, second_fails
    try:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="99 tokens"):
                complete(client, ["a", "b", "c"], stream=stream)
            assert eventually(lambda: not engine.running)
            assert len(engine.aborted) == len(engine.requests) > 0
    finally:
        del engine.submit


def test_a_failure_in_a_stream_is_an_error_event(client, engine):
    engine.fail_after = 3
    stream = chat(client, stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError, match="the device is gone"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="the device is gone"):
        chat(client)


def test_an_unexpected_fault_tells_nothing_and_keeps_the_connection(client, engine, caplog):
    engine.crash = True
    for stream in (False, True) * 5:
        with pytest.raises(openai.InternalServerError) as failure:
            chat(client, stream=stream)
        assert "secret" not in failure.value.response.text
        assert "Traceback" not in failure.value.response.text
        assert failure.value.type == "server_error"
    assert "secret detail" in caplog.text  # the log has it


def test_unknown_paths_and_methods_have_openais_shape(server):
    for method, path, status in (("GET", "/v2/x", 404), ("GET", "/v1/completions", 405)):
        response = httpx.request(method, server.url + path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
    for path, is_told in (("/chat/completions", True), ("/v1/completion", False)):
        message = httpx.post(server.url + path, json={}).json()["error"]["message"]
        assert message.startswith(f"Not Found: POST {path}")
        assert message.endswith("; the paths of OpenAI's API begin with /v1/") == is_told
