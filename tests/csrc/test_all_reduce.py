"""The protocol of the GPU all-reduce, with threads as ranks: sound, and planted faults are seen."""

import subprocess
from pathlib import Path

import pytest

from minisgl.csrc.build import Unavailable, find_compiler

ROOT = Path(__file__).parents[2]
COMMON = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread")
INCLUDES = ("-I", ROOT / "csrc")
RACE = "ThreadSanitizer: data race"


def compile_ranks(folder: Path, *flags: str) -> Path:
    try:
        compiler = find_compiler("cpu")
    except Unavailable as missing:
        pytest.skip(str(missing))
    program = folder / "ranks"
    source = ROOT / "tests/csrc/all_reduce_ranks.cpp"
    done = subprocess.run(
        [compiler, *COMMON, *INCLUDES, *flags, source, "-o", program],
        capture_output=True,
        text=True,
    )
    if done.returncode and "-fsanitize=thread" in flags and "tsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return compile_ranks(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    program = compile_ranks(tmp_path_factory.mktemp("tsan"), "-g", "-fsanitize=thread")
    if "unexpected memory mapping" in run(program, 2, 1, 1, 1, "sound").stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address layout")
    return program


def run(program: Path, ranks: int, blocks: int, lanes: int, calls: int, mode: str):
    words = [program, *map(str, (ranks, blocks, lanes, calls)), mode]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("ranks", "blocks", "lanes"), [(2, 1, 1), (3, 2, 2), (8, 2, 1)])
def test_every_sum_is_exact_on_every_rank(program, ranks, blocks, lanes):
    done = run(program, ranks, blocks, lanes, 300, "sound")
    assert done.returncode == 0, done.stdout


def test_no_race_is_found(sanitized):
    done = run(sanitized, 4, 2, 2, 100, "sound")
    assert done.returncode == 0, done.stdout + done.stderr
    assert RACE not in done.stderr


@pytest.mark.parametrize("mode", ["one-half", "moving-grid", "one-barrier"])
def test_a_planted_fault_gives_wrong_sums(program, mode):
    done = run(program, 4, 2, 2, 1000, mode)
    assert done.returncode == 1, done.stdout
    assert " 0 wrong" not in done.stdout


def test_a_missing_release_is_a_race(sanitized):
    """On x86 the sums stay right: only the sanitizer can see what a GPU would make of it."""
    assert RACE in run(sanitized, 4, 2, 2, 100, "relaxed").stderr


@pytest.mark.parametrize("mode", ["dead", "stopped"])
def test_waits_end_when_a_rank_is_gone(program, mode):
    """They end within the limit, or as soon as the host says so, and name the missing rank."""
    done = run(program, 4, 2, 2, 200, mode)
    assert done.returncode == 0, done.stdout
