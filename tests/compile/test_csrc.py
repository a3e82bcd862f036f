"""The gate of csrc/cuda: every kernel compiles for every GPU, without spills, no worse than before.

Runs where there is an nvcc; the committed figures are those of one version of it.
"""

import json

import pytest

from minisgl.csrc.build import Unavailable, find_compiler
from tests.compile.nvcc import ARCHS, BASELINE, Usage, compile_all, parse, readable, version

REGISTERS = 64 * 1024  # of a multiprocessor
THREADS = 512  # of a block of the all-reduce


def has_nvcc() -> bool:
    try:
        return bool(find_compiler("cuda"))
    except Unavailable:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc on this machine")


def problems(key: str, usage: Usage, known: dict[str, dict[str, int]] | None) -> list[str]:
    """What is wrong with a kernel; `known` is the baseline, None for another nvcc's."""
    found = []
    if usage.local:
        found.append(f"{key}: {usage.local} bytes of local memory")
    if usage.registers * THREADS > REGISTERS:
        found.append(f"{key}: {usage.registers} registers x {THREADS} threads do not fit")
    if known is not None:
        if key not in known:
            found.append(f"{key}: not in {BASELINE.name}; run tests.compile.nvcc --write")
        elif usage.registers > known[key]["registers"]:
            found.append(f"{key}: {usage.registers} registers, were {known[key]['registers']}")
    return found


@needs_nvcc
def test_every_kernel_stays_within_its_figures():
    known = json.loads(BASELINE.read_text()) if f"-{version()}." in BASELINE.name else None
    found = compile_all()
    assert len(found) == 18 * len(ARCHS)  # 3 types x 3 paths x with and without the norm
    faults = [text for key, usage in found.items() for text in problems(key, usage, known)]
    assert not faults, "\n".join(faults)


REPORT = """\
ptxas info    : Compiling entry function '_ZN7minisgl10all_reduce55_GLOBAL__N__x17all_reduce_kernel\
I6__halfLNS0_4PathE1ELb1EEEvNS0_4CallE' for 'sm_90a'
ptxas info    : Function properties for _Z1
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 70 registers, used 1 barriers, 64 bytes smem
"""


def test_planted_faults_are_seen():
    ((symbol, usage),) = parse(REPORT)
    assert readable(symbol) == "all_reduce_kernel<fp16, two_shot, norm>"
    assert usage == Usage(70, 16, 64)
    key = readable(symbol)
    known = {key: {"registers": 70}}
    assert any("local memory" in text for text in problems(key, usage, known))
    assert problems(key, Usage(70, 0, 64), known) == []
    assert problems(key, Usage(71, 0, 64), known) == [f"{key}: 71 registers, were 70"]
    assert problems(key, Usage(71, 0, 64), None) == []
    assert problems(key, Usage(129, 0, 64), None) != []
    assert problems(key, Usage(70, 0, 64), {}) != []
