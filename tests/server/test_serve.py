"""`python -m minisgl.serve` as a process: a real engine, signals, the engine's death."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from tests.server import small_tokenizers
from tests.server.calls import eventually
from tests.server.served import PATIENCE, ROOT, Served

USER = [{"role": "user", "content": "hi"}]
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 342,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(QWEN3))
    return small_tokenizers.save(directory, small_tokenizers.byte_level())


@pytest.fixture(scope="module")
def served(model):
    """A server for many tests. It ends by SIGTERM while idle, which is a test, too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Served(
        f"--model={model}", "--load-format=dummy", "--served-model-name=dummy", f"--port={port}"
    )
    server.early_health = health_while_starting(server, f"http://127.0.0.1:{port}/health")
    yield server
    server.process.send_signal(signal.SIGTERM)
    code = server.wait_exit()
    server.close()
    assert code == 0, server.output


def health_while_starting(server, url):
    """What /health said until the server said that it serves."""
    states = set()
    while "serving " not in server.output and server.process.poll() is None:
        with contextlib.suppress(httpx.ConnectError):
            response = httpx.get(url, timeout=PATIENCE)
            states.add((response.status_code, response.json()["status"]))
        time.sleep(0.01)
    return states


@pytest.fixture
def fresh(model):
    """A server whose engine has no model and takes its time; a test may end it as it likes."""
    server = Served(f"--model={model}", module="tests.server.slow_engine")
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


def chat(client, **options):
    options = {"max_tokens": 16, "temperature": 0} | options
    return client.chat.completions.create(model="dummy", messages=USER, **options)


def joined(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_it_says_what_it_serves_and_on_what(served):
    served.wait_ready()
    assert "serving dummy (Qwen3ForCausalLM, " in served.output
    assert "on CPU" in served.output
    none = "none (the chat template shows no form that is known)"
    assert f"server INFO parser of tool calls: {none}; of reasoning: {none}\n" in served.output


def test_it_is_not_ready_while_the_engine_loads(served):
    url = served.wait_ready()
    assert (503, "starting") in served.early_health
    assert httpx.get(f"{url}/health").status_code == 200


def test_chat_stream_and_seed(client):
    for options in ({}, {"temperature": 1, "seed": 5}, {"temperature": 1, "seed": 5, "n": 2}):
        whole = chat(client, **options)
        again = chat(client, **options)
        assert [c.message.content for c in whole.choices] == [
            c.message.content for c in again.choices
        ]
        assert whole.usage.completion_tokens <= 16 * len(whole.choices)
    assert joined(chat(client, temperature=1, seed=9, stream=True)) == (
        chat(client, temperature=1, seed=9).choices[0].message.content
    )
    drawn = {chat(client, temperature=1).choices[0].message.content for _ in range(4)}
    assert len(drawn) > 1


def test_logprobs_agree_with_greedy_choice(client):
    answer = chat(client, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True})
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 16
    for entry in content:
        assert entry.bytes == entry.top_logprobs[0].bytes
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob


def test_echoed_prompts_have_logprobs(client):
    answer = client.completions.create(
        model="dummy", prompt="Once upon", echo=True, logprobs=1, max_tokens=1
    )
    found = answer.choices[0].logprobs
    assert len(found.token_logprobs) == answer.usage.total_tokens
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])


def test_a_stop_string_cuts_the_text(client):
    text = chat(client, max_tokens=64, extra_body={"ignore_eos": True}).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        answer = chat(
            client, max_tokens=64, stop=stop, stream=stream, extra_body={"ignore_eos": True}
        )
        got = joined(answer) if stream else answer.choices[0].message.content
        assert got == text[: text.index(stop)]


def test_a_second_look_at_a_prompt_is_cached(client):
    prompt = list(range(5, 300))
    options = {"model": "dummy", "prompt": prompt, "max_tokens": 4, "n": 2}
    first = client.completions.create(**options)
    second = client.completions.create(**options)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_over_long_prompts_are_refused(client):
    with pytest.raises(openai.BadRequestError, match=r"65536 tokens.*70000"):
        client.completions.create(model="dummy", prompt=[5] * 70000)


def test_hanging_up_frees_the_engine(served):
    url = served.wait_ready()
    body = {"prompt": "x", "max_tokens": 60000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        events = response.iter_lines()  # dropping it would close the connection
        next(events)
        assert eventually_running(url, 1)
    assert eventually_running(url, 0)


def eventually_running(url, count):
    """Whether the engine comes to report so many running sequences."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        text = httpx.get(f"{url}/metrics").text
        if float(re.search(r"^minisgl_running_sequences (\S+)", text, re.M)[1]) == count:
            return True
        time.sleep(0.1)
    return False


def test_nothing_is_compiled_while_serving(served, client):
    chat(client)
    text = httpx.get(f"{served.wait_ready()}/metrics").text
    assert re.search(r"^minisgl_compilations_after_ready_total 0\.0$", text, re.M)


def test_a_port_in_use_is_said_at_once(model, served):
    port = served.wait_ready().rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "minisgl.serve", "--model", str(model), "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr


def test_sigterm_finishes_what_runs_and_exits_0(fresh):
    url = fresh.wait_ready()
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        events = response.iter_lines()
        next(events)
        fresh.process.send_signal(signal.SIGTERM)
        rest = [line for line in events if line]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert fresh.wait_exit() == 0, fresh.output


def test_sigterm_while_the_model_loads_exits_0(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = (f"--model={model}", f"--port={port}")
    with contextlib.closing(Served(*flags, module="tests.server.loading_engine")) as server:
        health = httpx.HTTPTransport(retries=10)  # with pauses that double: half a minute in all
        with httpx.Client(transport=health, timeout=PATIENCE) as client:
            assert client.get(f"http://127.0.0.1:{port}/health").status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0, server.output


EARLY = """
import os, signal, sys
from minisgl import serve
from minisgl.engine import process

def stop_after(owner, name):
    then = getattr(owner, name)
    def call(*args, **options):
        result = then(*args, **options)
        os.kill(os.getpid(), signal.{signal})
        return result
    setattr(owner, name, call)

stop_after({where})
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    "where", ['serve, "_listen"', 'process.EngineProcess, "__init__"', 'serve.asyncio, "Runner"']
)
def test_a_stop_before_the_server_listens_exits_0(model, where, name):
    command = [sys.executable, "-c", EARLY.format(where=where, signal=name)]
    command += [f"--model={model}", "--load-format=dummy", "--device=cpu", "--port=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_drain_that_takes_too_long_is_cut_with_an_error(model):
    server = Served(f"--model={model}", "--drain-timeout=0.3", module="tests.server.slow_engine")
    with contextlib.closing(server):
        url = server.wait_ready()
        body = {"prompt": "x", "max_tokens": 60000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
            events = response.iter_lines()
            next(events)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in events if line][-1]
        assert "error" in json.loads(last.removeprefix("data: "))
        assert server.wait_exit() == 0, server.output


def test_a_second_signal_does_not_wait_for_a_stuck_engine(model):
    flags = (f"--model={model}", f"--drain-timeout={PATIENCE}")
    with contextlib.closing(Served(*flags, module="tests.server.slow_engine")) as server:
        server.wait_ready()
        engine = server.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "a second signal exits" in server.output, PATIENCE)
        server.process.send_signal(signal.SIGTERM)
        try:
            assert server.process.wait(PATIENCE / 2) == 0, server.output
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)


def test_a_second_signal_ends_what_runs_with_errors_and_no_traceback(fresh):
    url = fresh.wait_ready()
    body = {"prompt": "x", "max_tokens": 60000, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nHost: x\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(content)
    with contextlib.ExitStack() as stack:
        whole, half = (
            stack.enter_context(socket.create_connection(("127.0.0.1", int(url[17:]))))
            for _ in range(2)
        )
        whole.sendall(head + content)
        half.sendall(head + content[:9])  # ends with the server: there is nothing to answer
        ask = {"url": f"{url}/v1/completions", "json": body | {"stream": True}}
        stream = stack.enter_context(httpx.stream("POST", **ask, timeout=PATIENCE))
        events = stream.iter_lines()
        next(events)
        fresh.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: "a second signal exits" in fresh.output, PATIENCE)
        fresh.process.send_signal(signal.SIGTERM)
        for answer in (whole.makefile().read(), [line for line in events if line][-1]):
            assert '"code":"engine_error"' in answer
            assert "the engine process ended" in answer
        assert fresh.wait_exit() == 0
    assert "Traceback" not in fresh.output
    assert "Internal Server Error" not in fresh.output


@pytest.mark.parametrize(("soft", "hard"), [(200, 200), (200, 400)])
def test_connections_leave_descriptors_for_the_next_one(model, soft, hard):
    """Of 200 descriptors, those of connections make room; where more may be had, they are."""
    flags = {"module": "tests.server.slow_engine", "descriptors": (soft, hard)}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.closing(Served(f"--model={model}", **flags)))
        url = server.wait_ready()
        for _ in range(250):
            idle = socket.create_connection(("127.0.0.1", int(url[17:])))
            stack.enter_context(idle)
        for _ in range(3):
            assert health(url) == 200
        told = "a connection ended with 503: there may be at most 72 connections"
        assert (told in server.output) == (hard == 200), server.output
        assert server.output.count("ended with 503") <= 1


def test_the_engines_death_fails_its_requests_and_the_server(fresh):
    url = fresh.wait_ready()
    body = {"prompt": "x", "max_tokens": 60000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        events = response.iter_lines()
        next(events)
        subprocess.run(["kill", "-KILL", str(fresh.engine_pid())], check=True)
        last = [line for line in events if line][-1]
    message = json.loads(last.removeprefix("data: "))["error"]["message"]
    assert message.startswith("the engine process ended with exit code -9")
    assert "\n" not in message  # the engine's last lines are for the operator
    assert fresh.wait_exit() == 1
    assert "the engine process ended with exit code -9" in fresh.output


def test_nothing_hangs_on_a_stuck_engine_and_it_goes_on_afterwards(model):
    flags = (f"--model={model}", "--watchdog-timeout=1")
    with contextlib.closing(Served(*flags, module="tests.server.slow_engine")) as server:
        url, engine = server.wait_ready(), server.engine_pid()
        body = {"prompt": "x", "max_tokens": 60000, "ignore_eos": True, "stream": True}
        ask = {"url": f"{url}/v1/completions", "json": body, "timeout": PATIENCE}
        with httpx.stream("POST", **ask) as response:
            events = response.iter_lines()
            next(events)
            os.kill(engine, signal.SIGSTOP)
            last = [line for line in events if line][-1]
        assert "no progress" in json.loads(last.removeprefix("data: "))["error"]["message"]
        refused = httpx.post(**ask)
        assert refused.status_code == httpx.get(f"{url}/health").status_code == 503
        assert "no progress" in refused.json()["error"]["message"]
        os.kill(engine, signal.SIGCONT)
        assert eventually(lambda: httpx.get(f"{url}/health").status_code == 200, PATIENCE)
        assert httpx.post(**ask | {"json": {"prompt": "x", "max_tokens": 2}}).status_code == 200
        assert eventually_running(url, 0)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    with contextlib.closing(
        Served(f"--model={tmp_path}", module="tests.server.slow_engine")
    ) as server:
        assert server.wait_exit() == 1
        assert "holds no model" in server.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model=/no/such/folder", "serve: model '/no/such/folder': no such file or folder\n"),
        ("--model=smolm2", "serve: model 'smolm2' is not known; did you mean smollm2?\n"),
        (f"--model={ROOT / 'docs'}", f"serve: {ROOT / 'docs'} holds no model: there is neither a"),
        ("--profile-dir=/dev/null", "profile_dir: cannot make /dev/null: File exists"),
        ("--device=cuda:99", "device must be "),
    ],
)
def test_what_cannot_be_used_is_one_line(flag, words):
    with contextlib.closing(Served(flag, "--log-level=error")) as server:
        assert server.wait_exit() == 1
        assert words in server.output
        assert "Traceback" not in server.output


@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full", ">&-", "2>&-"])
def test_it_serves_though_nobody_can_hear_it(model, where):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = f"exec {sys.executable} -m tests.server.slow_engine --model={model} --port={url[17:]}"
    server = subprocess.Popen(f"{command} {where}", cwd=ROOT, shell=True, stderr=subprocess.PIPE)
    try:
        assert eventually(lambda: health(url) == 200, PATIENCE)
        server.send_signal(signal.SIGTERM)
        said = server.communicate(timeout=PATIENCE)[1].decode()
        assert server.returncode == 0, said
        assert "Traceback" not in said
        assert ("cannot write to <stdout>: No space left" in said) == (where == ">/dev/full")
    finally:
        server.kill()


def health(url):
    with contextlib.suppress(httpx.ConnectError):
        return httpx.get(f"{url}/health").status_code
