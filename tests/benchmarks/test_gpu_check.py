"""The check's stages: bounded, resumable, and never losing what a run has found."""

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_stages import GROUP_SECONDS, GROUPS, SHARE, STAGES, START_SECONDS, Stage
from benchmarks.results import ROOT
from minisgl.parallel import shared_memory

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
    assert "## fails: end of its output\n\n````\nno good\n````" in report
    lacks = "| lacks | left out |  | abc | stand-ins for a GPU | not installed: no_such_package |"
    assert lacks in report


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
    for vague in ("unknown", "abc-dirty"):  # nobody knows whether the tree is the same
        check([counts], commit=vague)
        check([counts], commit=vague)
    assert mark.read_text() == "xxxxxxx"


def test_what_passed_on_another_device_counts_for_nothing_here(check, tmp_path):
    """A dry run, say, before the GPU is there."""
    mark = tmp_path.parent / "ran"
    check([PRINTS])
    path = tmp_path / "check.json"
    path.write_text(path.read_text().replace("stand-ins for a GPU", "NVIDIA H100"))
    check([Script("prints", f"open({str(mark)!r}, 'w')")])
    assert mark.exists()


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


def rows(count: int) -> str:
    return json.dumps({"benchmark": "x", "rows": [{"n": n} for n in range(count)]})


def test_the_best_of_earlier_runs_stays_until_one_passes(check, tmp_path):
    before = tmp_path / "writes.before" / "x.json"
    fails = "raise SystemExit(1)"

    def kept() -> int:
        return len(json.loads(before.read_text())["rows"])

    check([writes(rows(2), fails)])
    assert not before.exists()
    check([writes(rows(5), fails)])
    assert kept() == 2
    check([writes(rows(1), fails)])
    assert kept() == 5  # the second run, which had more
    for _ in range(2):
        _, stages = check([writes(rows(3), fails)])
        assert kept() == 5
    assert stages["writes"]["before"]["state"] == "failed"
    check([writes(rows(2))])
    assert not before.exists()  # it has passed
    for _ in range(2):
        _, stages = check([writes(rows(9), fails)], "writes", commit="def")
        assert kept() == 2  # what passed is worth more
        assert stages["writes"]["before"]["commit"] == "abc"
        assert "passed at abc: writes.before" in (tmp_path / "check.md").read_text()
    check([Script("writes", fails)], "writes", commit="def")  # leaves nothing
    assert kept() == 2


def test_what_was_not_begun_in_time_is_named(check):
    late = json.dumps({"benchmark": "x", "late": [f"batch {n}" for n in range(5)]})
    code, stages = check([writes(late)])
    assert code == 0
    assert stages["writes"]["state"] == "in part"
    begun = "not begun in time: batch 0, batch 1, batch 2 and 2 more"
    assert stages["writes"]["reason"] == begun
    code, stages = check([writes(late, "raise SystemExit(3)")])
    assert (code, stages["writes"]["reason"]) == (1, f"exit status 3; {begun}")


def test_a_stage_that_lacks_a_package_now_keeps_what_it_found(check, tmp_path):
    for then, state in (("", "passed"), ("raise SystemExit(1)", "failed")):
        check([writes('{"benchmark": "x"}', then)], "writes")
        lacking = Script("writes", "print()", 30, ("no_such_package",))
        code, stages = check([lacking], "writes")
        assert (code, stages["writes"]["state"]) == (0, state)
        assert (tmp_path / "writes" / "x.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"a": ',
        "[1]",
        "3",
        "{}",
        '{"benchmark": "tests"}',
        '{"benchmark": "x", "late": 3}',
        '{"benchmark": "x", "rows": [3]}',
        '{"benchmark": "x", "goals": "x"}',
        '{"benchmark": "x", "goals": [{}]}',
    ],
)
def test_a_file_that_no_stage_wrote_stops_nothing(check, tmp_path, text):
    code, stages = check([writes(text), PRINTS])
    assert code == 0
    assert [record["state"] for record in stages.values()] == ["passed", "passed"]
    check([writes(text), PRINTS], "writes")


@pytest.mark.parametrize(
    "text", ["", "{}", '{"stages"', "[]", '{"stages": []}', '{"stages": {"writes": {}}}']
)
def test_a_record_that_no_check_wrote_is_refused(check, tmp_path, text):
    (tmp_path / "check.json").write_text(text)
    with pytest.raises(SystemExit, match="is not what a check writes"):
        check([PRINTS])
    assert (tmp_path / "check.json").read_text() == text


def test_figures_without_a_record_are_kept(check, tmp_path):
    check([writes(rows(3))])
    (tmp_path / "check.json").unlink()
    _, stages = check([writes(rows(1), "raise SystemExit(1)"), PRINTS])
    assert stages["writes"]["before"]["state"] == "found"
    assert stages["prints"]["state"] == "passed"
    assert len(json.loads((tmp_path / "writes.before" / "x.json").read_text())["rows"]) == 3


def test_only_good_rows_count(check, tmp_path):
    """Neither what came late nor tests that failed make a run the better one."""
    fails = "raise SystemExit(1)"
    failed = [{"outcome": "failed"}] * 9
    late = {"benchmark": "x", "rows": failed, "late": ["x"] * 9}
    for _ in range(2):
        check([writes(rows(4), fails)])
        check([writes(json.dumps(late), fails)])
    check([PRINTS, writes(rows(0), fails)])
    assert len(json.loads((tmp_path / "writes.before" / "x.json").read_text())["rows"]) == 4


def test_everything_is_packed_after_every_stage(check, tmp_path):
    archive = tmp_path.parent / "all.tar.gz"
    check([writes(rows(1)), FAILS], "--archive", str(archive))
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert names >= {"check.json", "check.md", "writes/x.json", "writes/log.txt", "fails/log.txt"}


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
        (["--commit", "{x}", *DRY], "--commit must be letters, digits"),
        (["--archive", "/no/such/folder/x.tgz", *DRY], "--archive must be a file in a folder"),
        (["--out", "/x/y", "--archive", "/x/y/z.tgz", *DRY], "--archive must not lie in --out"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/x", "file", "file/below"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot be written: "):
        gpu_check.main([*DRY, "--out", str(tmp_path / place)])


def test_two_checks_do_not_write_to_one_folder(check, tmp_path):
    with gpu_check.only_one(tmp_path), pytest.raises(SystemExit, match="another check is writing"):
        check([PRINTS])
    check([PRINTS])


def test_wheels_are_unpacked_without_pip(check, tmp_path):
    wheels = tmp_path / "wheels"
    with pytest.raises(SystemExit, match="wheels: no folder"):
        check([PRINTS], "--wheels", str(wheels))
    wheels.mkdir()
    with pytest.raises(SystemExit, match=r"wheels: no \*.whl there"):
        check([PRINTS], "--wheels", str(wheels))
    needs = Script("needs", "import a_carried_package", 30, ("a_carried_package",))
    assert check([needs])[1]["needs"]["state"] == "left out"
    with zipfile.ZipFile(wheels / "a-1.whl", "w") as wheel:
        wheel.writestr("a_carried_package/__init__.py", "")
    assert check([needs], "--wheels", str(wheels))[1]["needs"]["state"] == "passed"
    (wheels / "b-1.whl").write_text("no zip")
    with pytest.raises(SystemExit, match=r"b-1.whl cannot be unpacked"):
        check([needs], "needs", "--wheels", str(wheels))


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


def children(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def measured(content: dict) -> list:
    return content.get("rows") or [content[name] for name in ("first_seconds",) if name in content]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("cards", signal.SIGKILL),
        ("kernels", signal.SIGTERM),
        ("decode", signal.SIGKILL),
        ("startup-8b", signal.SIGINT),
        ("all-reduce", signal.SIGKILL),
    ],
)
def test_killed_in_the_middle_a_stage_has_left_what_it_had(tmp_path, name, end):
    """Whoever ends the check ends the stage; its figures and the record are there."""
    if name == "all-reduce" and not shared_memory.available():
        pytest.skip("no C++ compiler or Python headers")
    command = [sys.executable, "-m", "benchmarks.gpu_check", *DRY, "--out", str(tmp_path), name]
    process = subprocess.Popen(
        [*command, "--commit", "abc"], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    folder, content = tmp_path / name, {}
    limit = time.monotonic() + 120
    while not measured(content):
        assert process.poll() is None, (folder / "log.txt").read_text()
        assert time.monotonic() < limit
        time.sleep(0.01)
        content = next((json.loads(p.read_text()) for p in folder.glob("*.json")), {})
    (stage,) = children(process.pid)
    process.send_signal(end)
    assert process.wait() != 0
    while is_running(stage):
        assert time.monotonic() < limit
        time.sleep(0.01)
    left = next(json.loads(path.read_text()) for path in folder.glob("*.json"))
    assert measured(left)[: len(measured(content))] == measured(content)
    assert not left["finished"]
    record = json.loads((tmp_path / "check.json").read_text())["stages"][name]
    assert (record["state"], record["reason"]) == ("cut", "the check ended while it ran")
    assert record["commit"] == left["commit"] == "abc"
