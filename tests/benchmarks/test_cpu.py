"""What `benchmarks.cpu` compares: who waits uses nothing, and a stream's tokens are counted."""

import asyncio
import json
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.cpu import chosen_sides, rivals
from benchmarks.cpu_processes import Process, Side, family
from benchmarks.http_load import Client, Job

# A busy loop in a child, as engines with processes of their own have one.
BUSY = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def ticks(pids: list[int]) -> int:
    """Of processor time, hundredths of a second."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields)


@pytest.fixture
def process(tmp_path):
    side = Side("busy", "busy", sys.executable, tmp_path, "")
    process = Process(side, [sys.executable, "-c", BUSY])
    yield process
    process.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in family(process.popen.pid))


def test_whoever_waits_uses_nothing_with_all_its_processes(process):
    end = time.monotonic() + 60
    while ticks(family(process.popen.pid)) < 20:  # it has begun to be busy
        assert time.monotonic() < end
        time.sleep(0.05)
    pids = family(process.popen.pid)
    assert len(pids) == 2
    process.signal(signal.SIGSTOP)
    time.sleep(0.1)
    before = ticks(pids)
    time.sleep(0.5)
    assert ticks(pids) == before
    process.signal(signal.SIGCONT)
    while ticks(pids) == before:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_engine_that_ends_by_itself_shows_what_it_said_last(tmp_path):
    side = Side("broken", "broken", sys.executable, tmp_path, "")
    process = Process(side, [sys.executable, "-c", "raise SystemExit('no such model')"])
    process.popen.wait()
    assert str(process.ended()) == "no such model\nbroken has ended: rc 1"
    process.close()


def test_vllm_gets_the_libraries_that_lie_beside_its_python(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    python = tmp_path / "bin" / "python"
    side = Side("vllm", "vllm", str(python), tmp_path, "M")
    assert "libiomp5.so" not in side.environment()["LD_PRELOAD"]
    assert "vllm runs without libiomp5.so" in capsys.readouterr().out
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    assert str(tmp_path / "lib" / "libiomp5.so") in side.environment()["LD_PRELOAD"].split(":")
    assert "LD_PRELOAD" not in Side("openvino", "openvino", "python", tmp_path, "M").environment()


def chunk(text: str, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("chunks", "counted"),
    [
        ([chunk("a"), chunk("b", "length")], 2),
        ([chunk("a"), chunk(""), chunk("b"), chunk("", "length")], 3),  # one has no text yet
        ([chunk("", "length")], 1),  # a single token without text
    ],
)
def test_a_chunk_that_only_closes_a_stream_is_no_token(chunks, counted):
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": counted}}
    body = b"".join(chunks) + b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n"

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async def ask():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = Client(f"http://127.0.0.1:{port}", model="m")
            return await client.send(Job([1], counted), time.perf_counter())

    outcome = asyncio.run(ask())
    assert outcome.error is None
    assert len(outcome.chunks) == counted


def test_llama_cpp_is_a_folder_and_a_file(tmp_path):
    command = Side("llamacpp", "llamacpp", "FOLDER", tmp_path, "M.gguf").offline()
    assert command[0] == "node"
    assert Path(command[1]).is_file()
    assert command[2:] == ["FOLDER", "M.gguf"]


def test_quantised_sides_are_compared_with_our_own_floats_and_the_same_bits():
    args = Namespace(quantization=["int8", "int4"], against="../before", engine=None)
    args.engine = ["llamacpp=F:M.gguf", "llamacpp-q4_0=F:M4.gguf", "x-4=http://h", "openvino-int3"]
    sides = chosen_sides(args, "M")
    assert [side.engine for side in sides[-4:]] == ["llamacpp", "llamacpp", "x-4", "openvino"]
    assert [side.model for side in sides[-4:-2]] == ["M.gguf", "M4.gguf"]
    assert rivals(sides, 3) == {
        "minisgl": ["before", "llamacpp", "x-4", "openvino-int3"],
        "minisgl-int8": ["minisgl"],
        "minisgl-int4": ["minisgl", "llamacpp-q4_0"],
    }
    assert sides[2].offline()[-1] == "quantization=int4"
    assert "--quantization int4" in " ".join(sides[2].server(1))
    args.engine = ["llamacpp=F:M.gguf", "llamacpp=F:M4.gguf"]
    with pytest.raises(SystemExit, match=r"sides need different names: .*llamacpp, llamacpp"):
        chosen_sides(args, "M")
