"""The compile gate: what the engine launches stays within limits and its committed figures."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

from minisgl.kernels.config import ARCHITECTURES
from minisgl.kernels.moe.portable import moe_experts_portable
from minisgl.kernels.offline import recorded
from minisgl.kernels.op import all_ops
from tools import compile_gate as gate
from tools.machine_code import TRITON, Report, expected, problems, read, regressions

variants = cache(gate.variants)

BASELINE = Path(__file__).parent / f"triton-{TRITON}.json"


@pytest.fixture(scope="module")
def baseline() -> dict:
    """Figures of this version of Triton. Write them with `gate --write tests/compile/...`."""
    return json.loads(BASELINE.read_text())


@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_every_kernel_is_as_good_as_it_was(arch: int, baseline: dict):
    found, faults = variants(arch), []
    for label, variant in found.items():
        report = read(label, variant)
        wrong = [*problems(report, expected(variant)), *regressions(report, baseline)]
        faults += [f"{report.key}: {text}" for text in wrong]
    assert not faults, "\n".join(faults)
    known = {key.removesuffix(f" sm_{arch}") for key in baseline if key.endswith(f" sm_{arch}")}
    assert known == found.keys()  # nothing of what is gone


def test_every_variant_is_compiled_once(monkeypatch):
    """However many models launch it, and however many times."""
    compiled = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *facts: compiled.append(facts[:2]))
    found = variants(90)
    for variant in found.values():
        variant.compile()
    assert len(set(compiled)) == len(compiled) == len(found)


def test_all_that_is_expected_is_expected_of_something():
    """A kernel that is renamed takes its expectations along."""
    found = [variant for arch in (80, 90) for variant in variants(arch).values()]
    for card in all_ops():
        for claim in card.expected:
            held = [v for v in found if v.name == claim.kernel and claim.where(v.facts)]
            wanted = {name for variant in held for name in expected(variant)}
            assert wanted == set(claim.instructions), (card.name, claim)


def test_experts_in_fp32_fit_the_least_shared_memory():
    meta = torch.empty(0, device="meta")
    with recorded(89) as launched:
        moe_experts_portable(
            meta.new_empty(1, 2048),
            meta.new_empty(128, 2 * 768, 2048),
            meta.new_empty(128, 2048, 768),
            meta.new_empty(1, 8),
            meta.new_empty(1, 8, dtype=torch.int32),
        )
    used = [variant.compile().metadata.shared for variant in launched.values()]
    assert max(used) > 32 * 1024  # the products' tiles are among them
    assert max(used) <= ARCHITECTURES[89].shared_bytes


GOOD = Report("op", 90, 128, 0, 1024, 8, dict.fromkeys(("load128", "tma"), 4))
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
    assert problems(good, ["load128"]) == []
    assert any(complaint in text for text in problems(replace(good, **change), ["load128"]))


def test_worse_than_baseline_is_seen():
    report = replace(GOOD, counts=COUNTS)
    known = {"registers": 128, "local": 0, "shared": 1024, "counts": COUNTS}
    assert regressions(report, {report.key: known}) == []
    assert regressions(replace(report, registers=129), {report.key: known})
    assert regressions(replace(report, counts=COUNTS | {"load128": 3}), {report.key: known})
    assert regressions(report, {})
