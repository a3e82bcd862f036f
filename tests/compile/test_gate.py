"""The compile gate: what the engine launches stays within limits and its committed figures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from minisgl.kernels.config import ARCHITECTURES
from minisgl.kernels.gate import QWEN_MOE, launches
from minisgl.kernels.launches import Launch, experts
from minisgl.kernels.lint import ARCHES, Report, problems, regressions, reports
from minisgl.kernels.offline import offline
from minisgl.kernels.shapes import EngineShapes

BASELINE = Path(__file__).parent / f"triton-{triton.__version__}.json"
LAUNCHES = [(arch, launch) for arch in ARCHES for launch in launches(arch)]


@pytest.fixture(scope="module")
def baseline() -> dict:
    """Figures of this version of Triton. Write them with `lint --write tests/compile/...`."""
    return json.loads(BASELINE.read_text())


@pytest.mark.parametrize(
    ("arch", "launch"), LAUNCHES, ids=[f"sm_{arch} {launch.label}" for arch, launch in LAUNCHES]
)
def test_launch(arch: int, launch: Launch, baseline: dict):
    faults = []
    for report in reports(launch, arch):
        found = [*problems(report, launch), *regressions(report, baseline)]
        faults += [f"{report.key}: {text}" for text in found]
    assert not faults, "\n".join(faults)


def test_experts_in_fp32_fit_the_least_shared_memory():
    model = replace(QWEN_MOE, dtype="float32")
    few = next(experts(model, EngineShapes(16, 64, 8, 8)))
    with offline(89) as compiled:
        few.run()
    used = [kernel.metadata.shared for kernel in compiled]
    assert max(used) > 32 * 1024  # the products' tiles are among them
    assert max(used) <= ARCHITECTURES[89].shared_bytes


def test_labels_are_unique():
    labels = [(arch, launch.label) for arch, launch in LAUNCHES]
    assert len(labels) == len(set(labels))


def test_the_baseline_has_nothing_of_what_is_gone(baseline: dict):
    known = {(arch, launch.label) for arch, launch in LAUNCHES}
    for key in baseline:
        label, arch = re.fullmatch(r"(.+) \w+ sm_(\d+)(?: #\d+)?", key).groups()
        assert (int(arch), label) in known, key


GOOD = Report("op", "kernel", 90, 128, 0, 1024, 8, dict.fromkeys(("load128", "tma"), 4))
COUNTS = {"load128": 4, "store128": 2, "tma": 4, "wgmma": 8, "wgmma_wait": 2}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"local": 8}, "local memory"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"registers": 168, "warps": 16}, "registers"),
        ({"counts": COUNTS | {"wgmma_wait": 5}}, "serialised"),
        ({"counts": COUNTS | {"load128": 0}}, "no load128"),
    ],
)
def test_planted_faults_are_seen(change, complaint):
    good = replace(GOOD, counts=COUNTS)
    launch = Launch("op", print, {}, expected=("load128",))
    assert problems(good, launch) == []
    assert any(complaint in text for text in problems(replace(good, **change), launch))


def test_worse_than_baseline_is_seen():
    report = replace(GOOD, counts=COUNTS)
    known = {"registers": 128, "local": 0, "shared": 1024, "counts": COUNTS}
    assert regressions(report, {report.key: known}) == []
    assert regressions(replace(report, registers=129), {report.key: known})
    assert regressions(replace(report, counts=COUNTS | {"load128": 3}), {report.key: known})
    assert regressions(report, {})
