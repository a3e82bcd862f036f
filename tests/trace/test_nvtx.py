"""NVTX ranges as a tool gets them: one of our own, loaded the way NVTX loads Nsight's."""

import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from minisgl import trace
from minisgl.csrc.build import find_compiler

ROOT = Path(__file__).parents[2]
COARSE = {"step", "plan", "dispatch", "collect", "update", "begin", "patch", "forward", "sample"}
NUM_STEPS = 3

GENERATE = """
    import sys
    from minisgl import LLM, SamplingParams
    with LLM(max_total_tokens=2048, profile_dir=sys.argv[1] or None, log_level="error") as llm:
        tokens = llm.generate([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True)).token_ids
    assert len(tokens) == 3
"""


def compiler() -> str | None:
    try:
        return find_compiler("cpu")
    except RuntimeError:
        return None


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    library = tmp_path_factory.mktemp("tool") / "tool.so"
    source = Path(__file__).parent / "nvtx_tool.c"
    command = [compiler(), "-x", "c", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    return library


def run_under(tool: Path, folder: Path, profile_dir: str) -> list[tuple[str, ...]]:
    """For every range of an engine's life, the names from the outermost to its own."""
    env = {
        **os.environ,
        "NVTX_INJECTION64_PATH": str(tool),
        "NVTX_TOOL_LOG": str(folder / "log"),
    }
    command = [sys.executable, "-c", textwrap.dedent(GENERATE), profile_dir]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    stacks: dict[str, list[str]] = {}
    paths = []
    for line in (folder / "log").read_text().splitlines():
        thread, what, domain, *name = line.split(" ", 3)
        assert domain == "minisgl"
        stack = stacks.setdefault(thread, [])
        if what == ">":
            stack.append(name[0])
            paths.append(tuple(stack))
        else:
            stack.pop()
    assert not any(stacks.values()), "a range was left open"
    return paths


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")


@needs_compiler
def test_a_tool_sees_the_parts_of_every_step_and_no_details(tool, tmp_path):
    paths = run_under(tool, tmp_path, "")
    assert {path[-1] for path in paths} == COARSE
    counts = Counter(paths)
    assert counts["step", "dispatch"] == counts["step", "collect"] == NUM_STEPS
    assert counts["step", "update"] == NUM_STEPS
    assert counts["step",] >= NUM_STEPS
    assert counts["step", "plan"] == counts["step",]
    assert counts["begin", "patch"] == counts["begin",] >= NUM_STEPS  # and the warm-up
    assert counts["sample",] == counts["forward",] == counts["begin",]


@needs_compiler
def test_a_tool_sees_layers_and_ops_where_profiling_was_asked_for(tool, tmp_path):
    counts = Counter(run_under(tool, tmp_path, str(tmp_path)))
    layers = {path[1] for path in counts if len(path) == 2 and path[1].startswith("layer")}
    assert layers == {f"layer {index}" for index in range(len(layers))}
    for layer in sorted(layers):
        assert counts["forward", layer] == NUM_STEPS
        assert counts["forward", layer, "qkv_prepare"] == NUM_STEPS
        assert counts["forward", layer, "decode"] == NUM_STEPS - 1
    assert counts["forward", "prepare_inputs"] == NUM_STEPS
    assert counts["sample", "accept_and_advance"] == NUM_STEPS
    assert not list(tmp_path.glob("*/"))  # the tool has the ranges: no trace was asked for


def test_without_a_tool_every_range_is_the_same_nothing():
    assert trace.nvtx_range("step") is trace.nvtx_range("plan") is trace.NOTHING
    assert trace.span("step") is trace.detail("linear") is trace.NOTHING
    trace.record_details()
    assert not trace.detailed()


def test_ranges_go_to_the_recorder_of_their_thread_only():
    named: list[str] = []

    @trace.ranged("ranged")
    def call(value: int, *, factor: int) -> int:
        return value * factor

    @trace.ranged("ranged detail", is_detail=True)
    def detail_call() -> str:
        return "done"

    def record() -> None:
        trace.record_with(lambda name: nullcontext(named.append(name)))
        with trace.span("span"), trace.detail("detail"):
            assert trace.detailed()
        assert call(3, factor=4) == 12
        assert detail_call() == "done"
        trace.record_with(None)
        assert detail_call() == "done"
        with trace.span("unseen"), trace.detail("unseen"):
            assert not trace.detailed()

    thread = threading.Thread(target=record)
    trace.record_with(lambda name: pytest.fail("another thread's recorder"))
    try:
        thread.start()
        thread.join()
    finally:
        trace.record_with(None)
    assert named == ["span", "detail", "ranged", "ranged detail"]
