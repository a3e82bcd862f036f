"""The profile tools: figures against known timelines, and every script as far as it goes on a CPU.

What the scripts pass to Nsight's tools is compared with their --help where they are installed.
"""

import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.intervals import covered, merge
from profiles import torch_trace
from profiles.timeline import Span, figures, read

ROOT = Path(__file__).parents[2]
SMALL = ["--device=cpu", "--batch=2", "--steps=6", "--input-len=8"]


def run(*words: str, path: str = "", python: str = sys.executable, code: int = 0) -> str:
    """What a program prints; one of ours finds the tools in `path`."""
    env = {**os.environ, "PYTHON": python, "PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def module(monkeypatch, capsys):
    """Runs a program of ours in this process: importing torch takes seconds."""

    def run_module(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        import_module(name).main()
        return capsys.readouterr().out

    return run_module


def result_of(output: str) -> dict:
    """The line of JSON that ends it, what libraries print aside."""
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


# ---- figures -----------------------------------------------------------------------------------


def test_unions_and_what_a_window_holds_of_them():
    union = merge([(5, 7), (0, 2), (1, 3), (6, 6.5), (7, 8)])
    assert union == [(0, 3), (5, 8)]
    assert list(covered(union, (2, 6))) == [1, 1]
    assert list(covered(union, (3, 5))) == [0, 0]


def steps_of(period: float, busy: float, plan_at: float) -> list[Span]:
    """Four steps: the device is busy for `busy` from their begin, a plan takes 2 from `plan_at`."""
    spans = []
    for step in range(4):
        begin = step * period
        spans.append(Span("forward", step, begin, begin + busy - 1))
        spans.append(Span("sample", step, begin + busy - 1, begin + busy))
        spans.append(Span("plan", step + 1, begin + plan_at, begin + plan_at + 2))
        spans.append(Span("collect", step, begin, begin + busy))
    return sorted(spans, key=lambda span: span.begin)


@pytest.mark.parametrize(
    ("plan_at", "hidden"), [(3.0, 1.0), (8.0, 0.0), (7.0, 0.5)], ids=["inside", "outside", "half"]
)
def test_idle_and_hidden_shares_of_a_known_timeline(plan_at, hidden):
    found = figures(steps_of(period=10.0, busy=8.0, plan_at=plan_at))
    assert found["steps"] == 4
    assert found["step_us"] == pytest.approx(10)
    assert found["median_gap_us"] == pytest.approx(2)
    assert found["device_idle_share"] == pytest.approx(0.2)
    assert found["planner_us"] == pytest.approx(2)
    assert found["planner_hidden_share"] == pytest.approx(hidden)


def test_what_is_no_timeline_or_trace_is_refused_by_name(tmp_path):
    file = tmp_path / "x.json"
    for content in ("", "[]", '{"traceEvents": [{"name": "process_name"}]}', '{"traceEvents": []}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"x\.json is not a step timeline"):
            read(file)
    name = {"name": "process_name", "ph": "M", "args": {"name": "a"}}
    file.write_text(json.dumps({"traceEvents": [name]}))
    with pytest.raises(ValueError, match="holds no step"):
        read(file)
    broken = tmp_path / "x.json.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"x\.json\.gz is not a trace"):
        torch_trace.read(broken)


def test_a_trace_with_a_gpu_has_kernels_and_an_idle_share(tmp_path, module):
    def event(cat: str, name: str, begin: float, dur: float) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": dur}

    events = [
        event("kernel", "decode", 100, 30),
        event("gpu_memcpy", "copy", 120, 20),  # beside it
        event("kernel", "decode", 160, 40),
        event("user_annotation", "linear", 0, 5),
        {"ph": "M", "name": "thread_name"},
    ]
    file = tmp_path / "rank0.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    result = result_of(module("profiles.torch_trace", f"--file={file}"))
    assert result["kernels"] == {"decode": 70, "copy": 20}
    assert result["ops"] == {"linear": 5}
    assert result["gpu_idle_share"] == pytest.approx(0.2)


# ---- the scripts -------------------------------------------------------------------------------


def test_the_timeline_is_measured_and_drawn(tmp_path, module):
    result = result_of(module("profiles.timeline", *SMALL, f"--out={tmp_path}"))
    assert result["overlap on"]["steps"] == result["overlap off"]["steps"] == 6
    assert result["overlap off"]["planner_hidden_share"] == 0
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    (file, _) = sorted(tmp_path.glob("*/timeline.json"))
    again = result_of(module("profiles.timeline", f"--file={file}", f"--out={tmp_path / 'again'}"))
    assert again["timeline.json"] in (result["overlap on"], result["overlap off"])
    assert (tmp_path / "again/timeline.png").exists()


def fake_tool(folder: Path, name: str, script: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("failure", ["exit 1", "exit 0"], ids=["fails", "leaves no report"])
def test_nsys_that_cannot_run_is_replaced_by_a_torch_trace(tmp_path, failure):
    path = fake_tool(tmp_path / "bin", "nsys", failure)
    fake_tool(tmp_path / "bin", "python-that-says", 'echo "asked: $*"')
    said = run(
        "profiles/nsys.sh", "--out", str(tmp_path), *SMALL, path=path, python="python-that-says"
    )
    assert "tracing with the torch profiler instead" in said
    words = ["-m", "profiles.torch_trace", "--out", str(tmp_path), *SMALL]
    assert f"asked: {' '.join(words)}" in said.splitlines()


def test_a_torch_trace_of_a_cpu_has_ops_and_no_gpu_to_idle(tmp_path, module):
    result = result_of(module("profiles.torch_trace", *SMALL, f"--out={tmp_path}"))
    ops = result["ops"]
    assert ops["forward"] + ops["sample"] > ops["linear"] > 0
    assert result["gpu_idle_share"] is None
    assert result["kernels"] == {}


def test_nsys_runs_the_workload_and_reads_its_report(tmp_path):
    path = fake_tool(
        tmp_path / "bin",
        "nsys",
        f"""[ "$1" = stats ] && exec echo "stats of" "$5"
        while [ "$1" != {sys.executable} ]; do shift; done
        "$@" --device cpu && echo report > {tmp_path}/nsys.nsys-rep""",
    )
    said = run("profiles/nsys.sh", "--out", str(tmp_path), *SMALL, path=path)
    assert "ran 6 decode steps of 2 requests on CPU" in said
    assert f"stats of {tmp_path}/nsys.nsys-rep" in said
    assert "torch profiler" not in said


def test_ncu_needs_an_op_and_the_tool(tmp_path):
    assert "which op?" in run("profiles/ncu.sh", code=2)
    if shutil.which("ncu") is None:
        assert "ncu is not installed" in run("profiles/ncu.sh", "decode", code=1)


def test_an_op_runs_on_its_benchmark_shapes(module):
    said = module("profiles.op", "rmsnorm", "--device=cpu")
    assert all(re.fullmatch(r"rmsnorm .+: cpu", line) for line in said.splitlines())
    with pytest.raises(SystemExit):
        module("profiles.op", "no-such-op")


SCRIPTS = [
    ("profiles/nsys.sh", ["--batch", "4"]),
    ("profiles/ncu.sh", ["decode", "--implementation", "portable"]),
]


@pytest.mark.parametrize(("script", "words"), SCRIPTS, ids=["nsys", "ncu"])
def test_dry_runs_print_commands_whose_python_part_is_understood(tmp_path, module, script, words):
    out = tmp_path / "out"
    printed = commands(run(script, "--dry-run", "--out", str(out), *words))
    assert not out.exists()
    ours = [command[command.index("-m") + 1 :] for command in printed if "-m" in command]
    assert ours
    for name, *flags in ours:
        assert set(words) <= set(flags)
        assert module(name, *flags, "--dry-run")
    tools = {command[0] for command in printed if "-m" not in command[:2]}
    assert tools & {"nsys", "ncu"}


@pytest.mark.parametrize(("script", "words"), SCRIPTS, ids=["nsys", "ncu"])
def test_flags_of_the_tools_exist(script, words):
    tool = Path(script).stem
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    for command in commands(run(script, "--dry-run", *words)):
        if command[0] != tool:
            continue
        end = command.index(sys.executable) if sys.executable in command else len(command)
        sub = command[1:2] if tool == "nsys" else []
        known = run(tool, *sub, "--help")
        for flag in (word.split("=")[0] for word in command[:end] if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), flag
        if tool == "ncu" and "--section" in command:
            sections = run("ncu", "--list-sections")
            named = {b for a, b in itertools.pairwise(command) if a == "--section"}
            assert all(re.search(rf"^{name}\b", sections, re.M) for name in named)


def test_what_ranges_cost_is_counted(module):
    result = result_of(module("profiles.ranges", "--device=cpu", "--steps=20"))
    assert result["count"]["part"] == 9
    assert result["count"]["layer"] == 5
    assert result["share"] < 0.1  # a hundred times what is measured on a quiet machine
