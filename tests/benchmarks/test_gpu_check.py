"""The check's stages: bounded, resumable, and never losing what a run has found."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_stages import GROUP_SECONDS, GROUPS, SHARE, STAGES, START_SECONDS, Stage
from benchmarks.results import ROOT

SLEEP = "import time; time.sleep(60)"
DRY = ["--device", "cpu", "--stand-ins"]


class Script(Stage):
    """A stage that runs a line of Python. {out} is its folder."""

    def __init__(self, name: str, code: str, seconds: int = 30, needs: tuple[str, ...] = ()):
        super().__init__(name, "scripts", seconds, code, needs)

    def command(self, *, stand_ins: bool, **fields: object) -> list[str]:
        return ["-c", self.words.replace("{out}", str(fields["out"]))]


def writes(text: str, then: str = "", seconds: int = 30) -> Stage:
    return Script("writes", f"open('{{out}}/x.json', 'w').write('{text}'); {then}", seconds)


PRINTS = Script("prints", "print('so')")
FAILS = Script("fails", "raise SystemExit('no good')")
HANGS = Script("hangs", f"print('begun', flush=True); {SLEEP}", 1)
LACKS = Script("lacks", "print()", 30, ("no_such_package",))


@pytest.fixture
def check(monkeypatch, tmp_path):
    def run(stages: list[Stage], *words: str, commit: str = "abc") -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "STAGES", tuple(stages))
        code = gpu_check.main([*words, *DRY, "--out", str(tmp_path), "--commit", commit])
        return code, json.loads((tmp_path / "check.json").read_text())["stages"]

    return run


def test_a_stage_that_fails_stops_no_other(check, tmp_path):
    code, stages = check([FAILS, HANGS, LACKS, PRINTS])
    assert code == 1
    assert {name: record["state"] for name, record in stages.items()} == {
        "fails": "failed",
        "hangs": "cut",
        "lacks": "left out",
        "prints": "passed",
    }
    assert "no good" in (tmp_path / "fails" / "log.txt").read_text()
    assert stages["hangs"]["reason"] == "not done after 1 s"
    assert (tmp_path / "hangs" / "log.txt").read_text() == "begun\n"
    assert stages["lacks"]["reason"] == "not installed: no_such_package"
    report = (tmp_path / "check.md").read_text()
    assert "## fails: end of its output\n\n```\nno good\n```" in report
    assert "| lacks | left out |  | abc | not installed: no_such_package |" in report


def test_a_stage_left_out_is_no_failure(check):
    assert check([LACKS, PRINTS])[0] == 0


def test_what_passed_at_this_commit_is_run_again_only_by_name(check, tmp_path):
    mark = tmp_path.parent / "count"
    counts = Script("counts", f"open({str(mark)!r}, 'a').write('x')")
    assert check([counts, FAILS])[0] == 1
    check([counts, FAILS])
    assert mark.read_text() == "x"
    code, stages = check([counts, FAILS], "counts")
    assert (code, mark.read_text(), set(stages)) == (0, "xx", {"counts", "fails"})
    check([counts], commit="def")
    assert mark.read_text() == "xxx"
    for _ in range(2):  # nobody knows whether an unknown commit is the same
        check([counts], commit="unknown")
    assert mark.read_text() == "xxxxx"


def test_a_group_runs_its_stages(check):
    other = Stage("other", "others", 30, "-c print()")
    with pytest.raises(SystemExit):
        check([PRINTS, other], "--group", "no-such-group")
    assert set(check([PRINTS, other], "--group", GROUPS[0])[1]) == set()


def test_what_a_stage_wrote_stays_when_it_is_cut(check, tmp_path):
    part = '{"benchmark": "x", "part": 1}'
    code, stages = check([writes(part, SLEEP, seconds=1)])
    assert (code, stages["writes"]["state"]) == (1, "cut")
    assert json.loads((tmp_path / "writes" / "x.json").read_text())["part"] == 1
    assert "- part: 1" in (tmp_path / "check.md").read_text()


def test_what_once_passed_stays_beside_what_does_not(check, tmp_path):
    whole, part = '{"benchmark": "x", "rate": 3}', '{"benchmark": "x", "rate": 0}'
    before = tmp_path / "writes.before" / "x.json"
    check([writes(whole)])
    for _ in range(2):
        _, stages = check([writes(part, "raise SystemExit(1)")], "writes", commit="def")
        assert stages["writes"]["state"] == "failed"
        assert stages["writes"]["passed_before"]["commit"] == "abc"
        assert json.loads(before.read_text())["rate"] == 3
        assert "passed at abc, see writes.before" in (tmp_path / "check.md").read_text()
    _, stages = check([writes(whole)], "writes", commit="def")
    assert not before.exists()
    assert "passed_before" not in stages["writes"]


def test_what_was_not_begun_in_time_is_named(check):
    code, stages = check([writes('{"benchmark": "x", "late": ["batch 64"]}')])
    assert code == 0
    assert stages["writes"]["state"] == "in part"
    assert stages["writes"]["reason"] == "not begun in time: batch 64"


def test_a_stage_that_lacks_a_package_now_keeps_what_it_found(check, tmp_path):
    check([writes('{"benchmark": "x"}')])
    lacking = Script("writes", "print()", 30, ("no_such_package",))
    code, stages = check([lacking], "writes")
    assert (code, stages["writes"]["state"]) == (0, "passed")
    assert (tmp_path / "writes" / "x.json").exists()


def test_the_report_shows_figures_rows_and_goals(check, tmp_path):
    goal = {"goal": "decode", "unit": "TB/s", "target": 2.5, "measured": None}
    goal |= {"state": "not measured", "why": "no such row", "predicted": [2.65, 2.9]}
    rows = [{"batch": 1, "ms": 3.5, "tags": {}}, {"batch": 2, "ms": 4.5, "tags": {}}]
    check([writes(json.dumps({"benchmark": "x", "rate": 3.5, "goals": [goal], "rows": rows}))])
    report = (tmp_path / "check.md").read_text()
    assert "- rate: 3.5" in report
    assert "| decode | 2.5 TB/s | 2.65-2.9 |  | not measured: no such row |" in report
    assert "| batch | ms |\n|---|---|\n| 1 | 3.5 |\n| 2 | 4.5 |" in report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compile", *DRY], "stage must be one of"),
        (["--device", "cpu"], "--device cpu needs --stand-ins"),
        (["--stand-ins"], "--device cpu needs --stand-ins"),
        (["--seconds", "0", *DRY], "--seconds must be at least 1, got 0"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_check.main(["--device", "cuda", "--out", str(tmp_path)])


# ---- the list of stages -----------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_fits_in_one_command(group):
    own = [stage.seconds for stage in STAGES if stage.group == group]
    assert sum(own) + START_SECONDS <= GROUP_SECONDS == 9 * 60


def test_names_are_folders_of_their_own():
    names = [stage.name for stage in STAGES]
    assert len({*names, *GROUPS}) >= len(names)
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


def test_every_stage_but_the_build_ends_by_itself_and_writes():
    for stage in STAGES:
        fields = {"device": "cuda", "out": "/o", "commit": "abc", "seconds": 9}
        words = stage.command(stand_ins=False, **fields)
        if stage.name != "build":
            for option, value in (("--out", "/o"), ("--seconds", "9"), ("--commit", "abc")):
                assert words[words.index(option) + 1] == value
        assert not any("{" in word for word in words)
    assert 0 < SHARE < 1


def test_the_walk_through_the_stages_is_true():
    """The tables of benchmarks/README.md name every stage, with its budget and what it needs."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| (\d+) s \| ([^|]*) \|", text, re.MULTILINE)
    assert listed == [(stage.name, str(stage.seconds), ", ".join(stage.needs)) for stage in STAGES]
    for group in GROUPS:
        total = sum(stage.seconds for stage in STAGES if stage.group == group)
        assert f"### `--group {group}`: {total} s" in text


# ---- killed in the middle ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cards", "kernels", "decode"])
def test_killed_in_the_middle_a_stage_has_left_what_it_had(tmp_path, name):
    command = [sys.executable, "-m", "benchmarks.gpu_check", *DRY, "--out", str(tmp_path), name]
    process = subprocess.Popen(
        [*command, "--commit", "abc"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    folder, content = tmp_path / name, {}
    end = time.monotonic() + 120
    while not content.get("rows"):
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
        content = next((json.loads(p.read_text()) for p in folder.glob("*.json")), {})
    stage = int(subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()[0])
    for group in (process.pid, stage):
        os.killpg(group, signal.SIGKILL)
    process.wait()
    left = next(json.loads(path.read_text()) for path in folder.glob("*.json"))
    assert left["rows"][: len(content["rows"])] == content["rows"]
    assert not left["finished"]
    record = json.loads((tmp_path / "check.json").read_text())["stages"][name]
    assert (record["state"], record["reason"]) == ("cut", "the check ended while it ran")
    assert record["commit"] == left["commit"] == "abc"
