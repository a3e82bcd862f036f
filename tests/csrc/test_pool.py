"""The native pool of threads: every block once, in any race, as ThreadSanitizer sees it too; as
many threads as are asked for, in a fork too."""

import os
import subprocess
from pathlib import Path

import pytest

from minisgl.csrc import Unavailable
from minisgl.csrc.build import SOURCES, find_compiler

try:
    COMPILER = find_compiler("cpu")
except Unavailable:
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.mark.parametrize("callers", [1, 3])
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_every_block_is_done_once(tmp_path: Path, sanitizer: str, callers: int) -> None:
    program = tmp_path / "stress"
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizer}", "-pthread", f"-I{SOURCES}"]
    sources = [Path(__file__).with_name("pool_stress.cpp"), SOURCES / "cpu/pool.cpp"]
    built = subprocess.run(
        [COMPILER, *flags, *sources, "-o", program], capture_output=True, text=True
    )
    if built.returncode and "san" in built.stderr:
        pytest.skip(f"no {sanitizer} sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [program, str(callers), "1"],
        env={**os.environ, "TSAN_OPTIONS": "die_after_fork=0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 20 * callers, done.stdout
