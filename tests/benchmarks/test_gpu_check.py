"""The check's stages: bounded, resumable by name, and never losing what earlier runs found."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Stage

PRINTS = Stage("prints", ("-c", "print('so'); print('{{\"ratio\": 2}}')"), 30)
FAILS = Stage("fails", ("-c", "raise SystemExit('no good')"), 30)
HANGS = Stage("hangs", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 1)
LACKS = Stage("lacks", ("-c", "print()"), 30, ("no_such_package",))


@pytest.fixture
def check(monkeypatch, tmp_path):
    def run(stages: list[Stage], *names: str) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "STAGES", tuple(stages))
        code = gpu_check.main([*names, "--device", "cpu", "--out", str(tmp_path)])
        return code, json.loads((tmp_path / "check.json").read_text())["stages"]

    return run


def test_a_stage_that_fails_stops_no_other(check):
    code, stages = check([FAILS, HANGS, LACKS, PRINTS])
    assert code == 1
    assert {name: record["state"] for name, record in stages.items()} == {
        "fails": "failed",
        "hangs": "failed",
        "lacks": "left out",
        "prints": "passed",
    }
    assert "no good" in stages["fails"]["output"]
    assert stages["hangs"]["reason"] == "not done after 1 s"
    assert "begun" in stages["hangs"]["output"]
    assert "no_such_package" in stages["lacks"]["reason"]
    assert stages["prints"]["figures"] == {"ratio": 2}


def test_what_passed_is_kept_and_run_again_only_by_name(check, tmp_path):
    mark = tmp_path.parent / "count"
    counts = Stage("counts", ("-c", f"open({str(mark)!r}, 'a').write('x')"), 30)
    assert check([counts, FAILS])[0] == 1
    check([counts, FAILS])
    assert mark.read_text() == "x"
    code, stages = check([counts, FAILS], "counts")
    assert code == 0
    assert mark.read_text() == "xx"
    assert set(stages) == {"counts", "fails"}
    files = [path.name for path in tmp_path.iterdir()]
    assert sorted(files) == ["check.json", "check.md"]


def writes(text: str, then: str = "") -> Stage:
    code = f"open('{{out}}/kernels.json', 'w').write('{text}'); {then}"
    return Stage("writes", ("-c", code), 2)


def test_a_run_that_is_cut_short_replaces_nothing(check, tmp_path):
    slow = "import time; time.sleep(60)"
    code, stages = check([writes("part", slow)])
    assert code == 1
    assert (tmp_path / "kernels.json").read_text() == "part"  # better than nothing
    check([writes("whole", "print('{{\"rate\": 3}}')")])
    code, stages = check([writes("part", slow)], "writes")
    assert code == 1
    assert (tmp_path / "kernels.json").read_text() == "whole"
    assert stages["writes"]["state"] == "failed"
    for _ in range(2):
        passed = stages["writes"]["passed_before"]
        assert passed["figures"] == {"in": "kernels.json"}
        assert passed.keys() >= {"commit", "date", "device", "seconds"}
        # One that fails by itself has come to its end: what it wrote is its result.
        _, stages = check([writes("wrong", "raise SystemExit(1)")], "writes")
        assert (tmp_path / "kernels.json").read_text() == "wrong"
    check([writes("new")])
    assert {path.name for path in tmp_path.iterdir()} == {"check.json", "check.md", "kernels.json"}


def test_the_report_shows_figures_and_goals(check, tmp_path):
    goal = {"goal": "decode", "unit": "TB/s", "target": 2.5, "measured": None}
    figures = {"rate": 3.5, "goals": [goal | {"state": "not measured", "why": "no such row"}]}
    text = json.dumps(figures).replace("{", "{{").replace("}", "}}")
    check([Stage("prints", ("-c", f"print({text!r})"), 30), FAILS])
    report = (tmp_path / "check.md").read_text()
    assert "- rate: 3.5" in report
    assert "| decode | 2.5 TB/s |  | not measured: no such row |" in report
    assert "## fails: end of its output\n\n```\nno good\n```" in report


def test_figures_are_the_json_of_the_last_line():
    assert gpu_check._last_json('so\n{"ratio": 2}\n') == {"ratio": 2}
    assert gpu_check._last_json('so\n[{"ratio": 2}]') == {"rows": [{"ratio": 2}]}
    for output in ("", "so", '{"ratio": 2}\nso', "[unfinished"):
        assert gpu_check._last_json(output) is None


def test_stages_run_modules_that_exist():
    for stage in gpu_check.STAGES:
        name = stage.words[1]
        own = (Path(gpu_check.ROOT) / name.replace(".", "/")).with_suffix(".py")
        assert own.exists() or own.with_suffix("").is_dir() or name == "pytest"


def test_unknown_stage_and_missing_gpu_are_refused(check, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        check([PRINTS], "compile")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_check.main(["--device", "cuda", "--out", str(tmp_path)])


def test_the_script_runs_a_stage(tmp_path):
    script = Path(gpu_check.ROOT) / "benchmarks/gpu_check.sh"
    run = subprocess.run(
        [script, "--device", "cpu", "--out", tmp_path, "build"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHON": __import__("sys").executable, "PATH": __import__("os").environ["PATH"]},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "| build | passed |" in run.stdout


def test_stages_end_within_ten_minutes():
    assert sum(stage.seconds for stage in gpu_check.STAGES) < 600
