"""A script that ends in the middle of a step ends as any other, and no process stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# With the default SIGINT handler, which is missing where a shell starts a job in the background.
LEAVE = """
import asyncio, os, signal, sys
from minisgl import LLM, AsyncLLM, SamplingParams

signal.signal(signal.SIGINT, signal.default_int_handler)
options = dict(max_total_tokens=2048, tp_size={tp}, device="cpu", log_level="warning")
asked = "Hello", SamplingParams(max_tokens=1000, ignore_eos=True)

def leave():
    {way}

def stay():
    for number, piece in enumerate(LLM(**options).stream(*asked)):
        if number == 3:
            return leave()

async def stay_async():
    async for piece in AsyncLLM(**options).stream(*asked):
        return leave()

{call}
"""
WAYS = {
    "exit": ("sys.exit(7)", 7, ""),
    "error": ("raise LookupError('of the script')", 1, "LookupError: of the script"),
    "end": ("pass", 0, ""),
    "interrupt": ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
}
CALLS = {"LLM": "stay()", "AsyncLLM": "asyncio.run(stay_async())"}
FEW = {("LLM", 1, way) for way in WAYS} | {("LLM", 2, "exit"), ("LLM", 2, "interrupt")}
FEW |= {("AsyncLLM", 1, "interrupt"), ("AsyncLLM", 1, "end")}


def run(code: str) -> tuple[int, str]:
    """The exit code and standard error of a script whose children hold its standard error too."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("kind", "tp", "way"),
    [
        pytest.param(*case, marks=[] if case in FEW else pytest.mark.thorough)
        for case in ((kind, tp, way) for kind in CALLS for tp in (1, 2) for way in WAYS)
    ],
)
def test_a_script_may_end_with_a_step_in_flight(kind: str, tp: int, way: str):
    statement, code, last = WAYS[way]
    returned, said = run(LEAVE.format(tp=tp, way=statement, call=CALLS[kind]))
    assert returned == code, said
    lines = said.splitlines()
    assert (lines[-1] if lines else "") == last


DEVICE = """
import time
from minisgl.device import CpuDevice
device = CpuDevice(1)
begun, ended = device.record(), []
device.submit(time.sleep, 0.3)
device.submit(ended.append, 1)
import atexit
{also}
"""


def test_the_device_ends_before_the_interpreter_does():
    assert run(DEVICE.format(also="atexit._run_exitfuncs(); assert ended == [1]")) == (0, "")


def test_a_device_that_is_closed_is_let_go():
    gone = "import weakref, gc; it = weakref.ref(device); device.close(); del device, begun"
    assert run(DEVICE.format(also=f"{gone}; gc.collect(); assert it() is None")) == (0, "")


FORK = """
import asyncio, os
from minisgl import LLM, AsyncLLM, SamplingParams

options = dict(max_total_tokens=2048, device="cpu", log_level="error", tp_size=2)
short = SamplingParams(max_tokens=3, temperature=0)
llm, other = LLM(**options), AsyncLLM(**options)
expected = llm.generate("Hello", short, use_tqdm=False).text
stream = llm.stream("Hello", short)
next(stream)

async def ask() -> None:
    async with other:
        pass

def told(call) -> None:
    try:
        call()
    except RuntimeError as error:
        assert "LLM was made in another process" in str(error), error
    else:
        raise AssertionError(call)

if (child := os.fork()) == 0:
    code = 1
    try:
        told(lambda: llm.generate("Hello", short, use_tqdm=False))
        told(lambda: next(llm.stream("Hello", short)))
        told(lambda: next(stream))
        told(llm.start_profile)
        told(lambda: asyncio.run(ask()))
        llm.close()
        asyncio.run(other.close())
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
stream.close()
assert llm.generate("Hello", short, use_tqdm=False).text == expected
llm.close()

async def answer() -> str:
    async with other:
        return (await other.generate("Hello", short)).text

assert asyncio.run(answer()) == expected
"""


def test_a_fork_is_told_and_leaves_the_engine_to_its_parent():
    assert run(FORK) == (0, "")


def test_ctrl_c_twice_in_a_chat_ends_it():
    command = [sys.executable, "-m", "minisgl.chat", "--max-total-tokens", "2048"]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--log-level", "warning"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"Tell me a long story about everything\n")
        process.stdin.flush()
        seen = b""
        while b"> " not in seen or len(seen.split(b"> ", 1)[1]) < 5:
            got = os.read(process.stdout.fileno(), 1000)
            assert got, process.stderr.read()
            seen += got
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        code, said = process.wait(60), process.stderr.read().decode()
    assert code in (0, 130, -signal.SIGINT), said
    assert "terminate called" not in said
