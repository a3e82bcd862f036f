"""The loader of native parts: background builds, one build for many processes, clear failures."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NoReturn, get_args

import pytest
import torch

from minisgl.config import CpuLevel
from minisgl.csrc import LEVELS, Module, Target, Unavailable, Unit, cpu_level, load, use_level
from minisgl.csrc.__main__ import report, say
from minisgl.csrc.build import find_compiler, find_headers, find_module, find_ninja

ROOT = Path(__file__).parents[2]
# Plain C API, because it compiles in a tenth of the time that pybind11 needs.
SOURCE = """
#include <Python.h>
#include "answer.h"
static PyObject *answer(PyObject *, PyObject *) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", "", -1, methods};
PyMODINIT_FUNC PyInit_probe() { return PyModule_Create(&module); }
"""
PROBE = Module("probe", "cpu", ("probe.cpp",), twin="the twin serves")


def can_build() -> bool:
    try:
        return bool(find_compiler("cpu") and find_ninja() and find_headers())
    except Unavailable:
        return False


needs_compiler = pytest.mark.skipif(not can_build(), reason="no C++ compiler or Python headers")


@pytest.fixture
def target(tmp_path, monkeypatch) -> Target:
    """A tiny module with an empty cache and a compiler that notes each run in `calls`."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "probe.cpp").write_text(SOURCE)
    (sources / "answer.h").write_text("#define ANSWER 42\n")
    if can_build():
        compiler = tmp_path / "cxx"
        compiler.write_text(
            f'#!/bin/sh\necho run >> {tmp_path}/calls\nexec {find_compiler("cpu")} "$@"\n'
        )
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Target(PROBE, cpu_level(), sources)


def compiler_runs(tmp_path: Path) -> int:
    calls = tmp_path / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


PROCESS = """
import sys
from pathlib import Path
from typing import NoReturn
from minisgl.csrc import Module, Target, Unit, cpu_level
target = Target(Module("probe", "cpu", ("probe.cpp",), twin=""), cpu_level(), Path(sys.argv[1]))
unit = Unit(target)
unit.start(wait=sys.argv[2] == "wait")
print(unit.module.answer() if unit.module else None, flush=True)
"""


def start_process(target: Target, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(target.sources), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@needs_compiler
def test_builds_in_the_background_once(target, tmp_path):
    unit = Unit(target)
    unit.start(wait=False)
    assert unit.module is None  # the twin's turn
    unit.start(wait=True)
    assert unit.module is not None
    assert unit.module.answer() == 42
    runs = compiler_runs(tmp_path)
    again = Unit(target)
    again.start(wait=False)  # a finished build is there at once
    assert again.module is not None
    assert compiler_runs(tmp_path) == runs == 2  # one compile, one link


@needs_compiler
def test_a_build_says_that_it_begins_and_how_far_it_is(target, monkeypatch, caplog, capsys):
    monkeypatch.setattr("minisgl.csrc.build.REPORT_SECONDS", 0.02)
    Unit(target).start(wait=True)
    first, *others = [record.getMessage() for record in caplog.records]
    begins = f"building {target} of 1 files, once on this machine"
    assert first == f"{begins}, in the background; until then: the twin serves"
    assert others[0] == f"{target}: 0 of 1 files are compiled"
    shutil.rmtree(target.library.parent)
    assert report(target)
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"csrc: {begins}"
    assert second == f"csrc: {target}: 0 of 1 files are compiled"
    assert last.startswith(f"csrc: {target}: built in ")


def test_a_line_of_a_build_is_one_write(monkeypatch):
    """Two builds at the same time would have their texts first, then their ends of line."""
    written = []
    monkeypatch.setattr("sys.stdout.write", written.append)
    say("a")
    assert written == ["csrc: a\n"]


@needs_compiler
def test_two_processes_build_once(target, tmp_path):
    processes = [start_process(target, "wait") for _ in range(3)]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["42"] * 3
    assert compiler_runs(tmp_path) == 2


@needs_compiler
def test_a_build_outlives_the_process_that_started_it(target, tmp_path):
    process = start_process(target, "leave")
    assert process.communicate(timeout=60)[0].strip() == "None"
    unit = Unit(target)
    unit.start(wait=True)  # waits for the orphan if it still runs
    assert unit.module is not None
    assert compiler_runs(tmp_path) == 2


@needs_compiler
def test_leftovers_of_a_killed_build_do_no_harm(target):
    folder = target.library.parent
    folder.mkdir(parents=True)
    (folder / "lock").write_text("")  # whoever held it is gone, and so is the kernel's lock
    (folder / "build.ninja").write_text("rubbish")
    (folder / f"{target.library.name}.partial").write_bytes(b"\x7fELF half")
    unit = Unit(target)
    unit.start(wait=True)
    assert unit.module is not None
    assert unit.module.answer() == 42


@needs_compiler
def test_a_failed_build_is_told_once_and_not_repeated(target, tmp_path, caplog):
    (target.sources / "probe.cpp").write_text("int broken() { return nonsense; }\n")
    unit = Unit(target)
    with caplog.at_level(logging.WARNING, "minisgl"):
        for _ in range(3):
            unit.start(wait=True)
    assert unit.module is None
    assert compiler_runs(tmp_path) == 1
    record = caplog.records[-1]
    assert [r for r in caplog.records if "failed" in r.getMessage()] == [record]
    assert "nonsense" in record.getMessage()
    assert "the twin serves" in record.getMessage()


def test_without_a_compiler_one_line_says_what_it_costs(target, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    unit = Unit(target)
    with caplog.at_level(logging.DEBUG, "minisgl"):
        for _ in range(3):
            unit.start(wait=False)
    assert [r.getMessage() for r in caplog.records] == [
        "no C++ compiler ($CXX, c++, g++ or clang++); the twin serves"
    ]


@needs_compiler
@pytest.mark.parametrize(
    ("place", "words"), [("", "no home to keep builds in"), ("/" + "x" * 300, "name too long")]
)
def test_a_cache_that_is_nowhere_is_told_not_raised(target, monkeypatch, caplog, place, words):
    def nobody(*_: object) -> NoReturn:
        raise KeyError("no passwd entry")

    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    unit = Unit(target)
    with caplog.at_level(logging.WARNING, "minisgl"):
        unit.start(wait=True)
    assert unit.module is None
    assert words in caplog.text


@needs_compiler
def test_an_unwritable_cache_is_told_not_raised(target, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    unit = Unit(target)
    with caplog.at_level(logging.WARNING, "minisgl"):
        unit.start(wait=True)
    assert unit.module is None
    assert "cannot build" in caplog.text


@needs_compiler
def test_the_cache_key_holds_everything_that_decides_the_code(target, monkeypatch, tmp_path):
    seen = {target.library}
    assert target.library in seen  # and is stable
    (target.sources / "answer.h").write_text("#define ANSWER 43\n")
    seen.add(target.library)
    (target.sources / "probe.cpp").write_text(SOURCE + "\n")
    seen.add(target.library)
    other = tmp_path / "other-cxx"
    shutil.copy(os.environ["CXX"], other)
    monkeypatch.setenv("CXX", str(other))
    seen.add(target.library)
    monkeypatch.setattr(Target, "flags", ["-O1"])
    seen.add(target.library)
    assert len(seen) == 5


def test_names_and_archs_are_checked():
    with pytest.raises(KeyError, match=r"no native module 'nothing'; there are .*core_ops"):
        load("nothing")
    with pytest.raises(ValueError, match=r"core_ops is built for \['avx512_bf16', .*got '90a'"):
        Target(find_module("core_ops"), "90a")
    with pytest.raises(ValueError, match="all_reduce is a cuda module: it needs an arch"):
        load("all_reduce")


def test_the_best_level_that_the_cpu_has_is_chosen():
    """By what /proc/cpuinfo lists, beside a program that asks the CPU itself."""
    ask = torch.backends.cpu.get_cpu_capability()
    level = cpu_level()
    assert level == {"AVX512": level, "AVX2": "avx2"}.get(ask, "portable")
    assert level.startswith("avx512") == (ask == "AVX512")


def test_a_level_is_chosen_once_a_process():
    """In a process of its own, whose modules are of that level."""
    lines = """
from minisgl import csrc
csrc.use_level("auto")
csrc.use_level("portable")
module = csrc.load("core_ops", wait=True)
assert module is None or "core_ops-portable-" in module.__file__, module
csrc.use_level("portable"), csrc.use_level("auto")
for level in ("avx2", "fast"):
    try:
        csrc.use_level(level)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    in_use, unknown = done.stdout.splitlines()
    present = list(LEVELS)[list(LEVELS).index(cpu_level()) :]
    assert unknown == f"cpu_level must be auto or one of {present} on this CPU, got 'fast'"
    if "avx2" in present:
        assert in_use == "cpu_level must be auto or portable, as in use already, got 'avx2'"


def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("minisgl.csrc.cpu_level", lambda: "avx2")
    refusal = r"one of \['avx2', 'portable'\] on this CPU, got 'avx512'"
    with pytest.raises(ValueError, match=f"^cpu_level must be auto or {refusal}$"):
        use_level("avx512")


def test_the_config_has_every_level():
    assert get_args(CpuLevel) == ("auto", *LEVELS)


CUDA_SOURCE = """
#include <Python.h>
__global__ void add_one(int *x) { x[threadIdx.x] += 1; }
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", "", -1, nullptr};
PyMODINIT_FUNC PyInit_probe() { return PyModule_Create(&module); }
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on this machine")
def test_a_cuda_module_builds_for_each_arch(target):
    (target.sources / "probe.cu").write_text(CUDA_SOURCE)
    module = Module("probe", "cuda", ("probe.cu",), twin="")
    libraries = [Target(module, arch, target.sources).build(print) for arch in ("80", "90a")]
    assert libraries[0] != libraries[1]
    for library, arch in zip(libraries, (b"sm_80", b"sm_90a"), strict=True):
        assert arch in library.read_bytes()


def test_the_command_line_without_a_compiler(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "minisgl.csrc", "build"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"core_ops ({cpu_level()}): not built: no C++ compiler" in done.stdout


@needs_compiler
def test_load_polls_cheaply_until_ready():
    deadline = time.monotonic() + 120
    while (module := load("core_ops")) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert module is not None
    assert load("core_ops") is module
