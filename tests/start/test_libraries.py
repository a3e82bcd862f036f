"""How libraries below torch are set where a process starts, and what that bounds."""

import subprocess
import sys
from pathlib import Path

import pytest

from minisgl.config import EngineConfig
from minisgl.engine.process import EngineProcess
from minisgl.libraries import PRODUCT_BYTES, PRODUCTS_KEPT, settings

ROOT = Path(__file__).parents[2]
OURS = {
    "GOMP_SPINCOUNT": "1000",
    "LRU_CACHE_CAPACITY": "16",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (*OURS, "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def ours(environment: dict[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in OURS if name in environment}


def test_what_the_user_has_set_stays(monkeypatch):
    assert ours(settings()) == OURS
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "5")
    assert ours(settings()) == OURS | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "5"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # which libgomp would not look at beside ours
    assert "GOMP_SPINCOUNT" not in settings()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert settings()["GOMP_SPINCOUNT"] == "7"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_the_engines_process_has_the_settings(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "9")
    process = EngineProcess("tests.world.engine:build", EngineConfig())
    try:
        words = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
    finally:
        process.close()
    found = dict(word.split("=", 1) for word in words if "=" in word)
    assert ours(found) == OURS | {"LRU_CACHE_CAPACITY": "9"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("name", ["LLM", "AsyncLLM"])
def test_importing_the_offline_api_is_in_time_for_torch(name):
    code = "import os, sys; from minisgl import {}; print('torch' in sys.modules, {})"
    done = run(code.format(name, "os.environ['GOMP_SPINCOUNT']"))
    assert done.stdout == "False 1000\n"


def test_a_chat_is_in_time_for_torch():
    code = """
import os, sys
from minisgl import chat
from minisgl.config import EngineConfig
chat.LocalPartner(EngineConfig(max_total_tokens=1024, device="cpu"), {})
print(os.environ["GOMP_SPINCOUNT"])
"""
    assert run(code).stdout == "1000\n"


LENGTHS = """
import ctypes
from minisgl import libraries
libraries.prepare()
import torch
from torch.nn.functional import linear

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "top"
    )]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Counts
weights = [torch.zeros(n, 256, dtype=torch.bfloat16) for n in (256, 512, 768, 1024, 2048)]

def grown(lengths):
    before = libc.mallinfo2()
    for length in lengths:
        for weight in weights:
            linear(torch.zeros(length, 256, dtype=torch.bfloat16), weight)
    after = libc.mallinfo2()
    return after.used + after.hblkhd - before.used - before.hblkhd

with torch.inference_mode():
    grown([200])
    print(grown([200] * 200), grown(range(201, 401)))
"""


def test_memory_does_not_grow_with_the_number_of_prompt_lengths():
    """Five products of 200 lengths are 1,000 shapes: without a bound they grew by 420 MB."""
    if sys.platform != "linux":
        pytest.skip("needs glibc's count of what is allocated")
    same, different = map(int, run(LENGTHS).stdout.split())
    assert same < PRODUCT_BYTES
    assert different < PRODUCTS_KEPT * PRODUCT_BYTES
