"""Every stage of the check runs to its end with stand-ins for the GPU, and imports no more than it
says that it needs.

Each runs in an environment of its own that holds torch, triton, numpy and the packages the stage
names, without git; what one needs and does not name would end it.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu_stages import STAGES
from benchmarks.results import ROOT
from minisgl.parallel import shared_memory
from tests.benchmarks.environment import make_environment, path_with

BARE = ("torch", "triton", "numpy")
NEEDS = sorted({tuple(sorted({*BARE, *stage.needs})) for stage in STAGES} - {tuple(sorted(BARE))})


def dry_run(folder: Path, packages: tuple[str, ...], *stages: str) -> dict[str, dict]:
    """Runs stages in an environment of these packages; how each ended."""
    python = make_environment(folder / "environment", packages)
    programs = ["bash", "c++", "g++", "as", "ld"]
    words = ["--device", "cpu", "--stand-ins", "--commit", "abc1234", "--out", folder / "out"]
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_check.sh", *words, *stages],
        env={
            "PYTHON": str(python),
            "PATH": path_with(folder / "bin", programs),
            "HOME": os.environ["HOME"],
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checked = json.loads((folder / "out" / "check.json").read_text())
    assert checked["about"]["commit"] == "abc1234"
    return checked["stages"]


def found(folder: Path, stage: str, name: str) -> dict:
    content = json.loads((folder / "out" / stage / f"{name}.json").read_text())
    assert content["commit"] == "abc1234"
    assert content["finished"]
    assert content["late"] == []
    return content


def look_at_cards(folder: Path) -> None:
    content = found(folder, "cards", "tests")
    assert {row["outcome"] for row in content["rows"]} == {"passed"}
    assert content["passed"] == len(content["rows"]) >= 20
    skipped = found(folder, "hopper-cards", "tests")
    assert "Gluon is not interpreted" in skipped["rows"][0]["why"]
    # What the other files need is missing here: they are skipped by its name, and end no others.
    line = "-m pytest -q --collect-only -m gpu -p no:cacheprovider --confcutdir tests/gpu tests/gpu"
    collected = subprocess.run(
        [folder / "environment/bin/python", *line.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stdout
    assert "test_cards.py::test_case" in collected.stdout
    for file in sorted((ROOT / "tests/gpu").glob("test_*.py")):
        if file.name != "test_cards.py":
            assert re.search(rf"SKIPPED .*{file.name}.*could not import", collected.stdout), file


def look_at_kernels(folder: Path) -> None:
    content = found(folder, "kernels", "kernels")
    assert (content["wrong"], content["missing"]) == ([], [])
    assert {"decode", "attention", "cascade", "sample"} <= {row["op"] for row in content["rows"]}
    states = {goal["state"] for goal in content["goals"]}
    assert states <= {"met", "short", "measured", "not measured"}
    assert (folder / "out" / "kernels" / "kernels.md").exists()
    gluon = found(folder, "hopper", "kernels")
    assert {row["implementation"] for row in gluon["rows"]} == {"hopper"}


def look_at_build(folder: Path) -> None:
    assert "core_ops" in (folder / "out" / "build" / "log.txt").read_text()


def look_at_engine(folder: Path) -> None:
    content = found(folder, "engine", "tests")
    states = {row["test"].split("::")[1].split("[")[0]: row["outcome"] for row in content["rows"]}
    assert states["test_same_tokens_as_on_cpu"] == "passed"
    assert states["test_the_host_waits_at_events_only"] == "skipped"
    assert "failed" not in states.values()
    assert content["running"] == []


def look_at_steps(folder: Path) -> None:
    for stage in ("decode", "decode-8b"):
        content = found(folder, stage, "decode")
        ways = ["as it is", "overlap off", "graphs off"]
        seen = [(row["batch"], row["way"]) for row in content["rows"]]
        assert seen == [(batch, way) for batch in (1, 3) for way in ways]
        for row in content["rows"]:
            assert row["equal"] == 1
            assert -1e-9 < row["idle"] < 1
            assert row["kernels_idle"] is None
            assert 0 < row["roofline"] < 1
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        assert content["compilations_after_ready"] == 0
        assert [row["way"] for row in content["mixed"]] == ["eager", "piecewise"]
        for row in content["mixed"]:
            assert (row["batch"], row["chunk"], row["equal"]) == (1, 16, 1)
            assert min(row["step_ms"], row["device_ms"], row["launch_ms"]) > 0
        assert content["mixed"][0]["ratio"] == 1
    content = found(folder, "cascade", "cascade")
    assert content["equal_tokens"] == 1.0
    assert content["times_as_fast"] > 0
    assert (content["batch"], content["shared"]) == (3, 40)


def look_at_all_reduce_tests(folder: Path) -> None:
    content = found(folder, "all-reduce-tests", "tests")
    assert {row["outcome"] for row in content["rows"]} == {"skipped"}
    assert "only a GPU has this" in content["rows"][0]["why"]


def look_at_gluon(folder: Path) -> None:
    """No CPU can play it: with these packages the test is found, and skipped."""
    (row,) = found(folder, "hopper-engine", "tests")["rows"]
    assert row["test"].endswith("test_gluon.py::test_gluon_scores_prompts_as_triton_does")
    assert row["outcome"] == "skipped"


def look_at_all_reduce(folder: Path) -> None:
    content = found(folder, "all-reduce", "all_reduce")
    assert [row["rows"] for row in content["rows"]] == [1, 3]
    for row in content["rows"]:
        assert row["bytes"] == 4 * 72 * row["rows"]
        assert row["sum"].keys() == row["norm"].keys() == {"gloo", "shared"}
        assert all(seconds > 0 for seconds in row["sum"].values())


def look_at_models(folder: Path) -> None:
    content = found(folder, "startup-8b", "startup")
    assert content["model"] == "tiny"
    assert abs(sum(content["stages"].values()) - content["seconds"]) < 0.01
    assert {"load weights", "plan memory", "warm up"} <= set(content["engine_stages"])
    (row,) = found(folder, "speculative", "speculative")["rows"]
    assert (row["side"], row["batch"], row["workload"]) == ("draft", 1, "chat")
    assert found(folder, "offline", "offline")["output_tokens_per_second"]["minisgl"] > 0


LOOKS = {
    "cards": look_at_cards,
    "build": look_at_build,
    "engine": look_at_engine,
    "hopper-engine": look_at_gluon,
    "decode": look_at_steps,
    "all-reduce-tests": look_at_all_reduce_tests,
    "all-reduce": look_at_all_reduce,
    "startup-8b": look_at_models,
}


@pytest.mark.parametrize("packages", NEEDS, ids=lambda packages: "+".join(packages))
def test_stages_run_with_what_they_need_and_nothing_more(tmp_path, packages):
    """What they write is looked at, too."""
    own = [stage.name for stage in STAGES if {*BARE, *stage.needs} == {*packages}]
    looks = [LOOKS[name] for name in own if name in LOOKS]
    if not shared_memory.available() and look_at_all_reduce in looks:
        pytest.skip("no C++ compiler or Python headers")
    stages = dry_run(tmp_path, packages, *own)
    assert {name: record["state"] for name, record in stages.items()} == dict.fromkeys(
        own, "passed"
    )
    assert looks
    for look in looks:
        look(tmp_path)


def test_a_machine_with_torch_triton_and_numpy_alone_runs_what_it_can(tmp_path):
    stages = dry_run(tmp_path, BARE)
    assert list(stages) == [stage.name for stage in STAGES]
    for stage in STAGES:
        lacking = [name for name in stage.needs if name not in (*BARE, "jinja2")]  # torch has it
        reason = f"not installed: {', '.join(lacking)}" if lacking else ""
        assert stages[stage.name]["state"] == ("left out" if lacking else "passed")
        assert stages[stage.name]["reason"] == reason
    look_at_kernels(tmp_path)
