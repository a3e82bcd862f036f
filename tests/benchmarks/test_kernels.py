"""The kernel benchmark checks what it times, names what is wrong, and judges goals."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import report
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.check import WrongResult, check
from benchmarks.kernels.goals import FILTERS, goals
from benchmarks.kernels.measure import compare, measure, passes, stand_ins, ways_on
from benchmarks.kernels.timing import Ceilings, HostClock, Timer
from benchmarks.kernels.workload import Setting, Workload
from benchmarks.kernels.workloads import workloads
from minisgl.kernels.op import all_ops

CPU = torch.device("cpu")


def _setting() -> Setting:
    return Setting(CPU, torch.bfloat16, torch.Generator().manual_seed(0))


def _first(name: str) -> Workload:
    return next(w for w in workloads(small=True) if w.op.name == name)


def off_by_a_percent(x, *args, **kwargs):
    return 1.01 * _first("rmsnorm").op.reference(x, *args, **kwargs)


def last_key_forgotten(q, kv, **kwargs):
    shorter = kv._replace(seq_lens=kv.seq_lens - 1)
    return _first("decode").op.reference(q, shorter, **kwargs)


@pytest.mark.parametrize(
    ("name", "wrong"), [("rmsnorm", off_by_a_percent), ("decode", last_key_forgotten)]
)
def test_wrong_kernel_is_not_timed(name, wrong):
    workload = _first(name)
    arguments = workload.make(_setting())
    with pytest.raises(WrongResult, match="is off by"):
        check(workload, wrong, arguments)
    assert check(workload, workload.op.reference, arguments) < 0.02


def fails(*args, **kwargs):
    raise OSError("planted")


def serves_other_shapes(*args, **kwargs):
    raise ValueError("x must be longer")


TIMER = Timer(CPU, 1, small=True)


def test_a_failing_implementation_stops_no_other():
    workload = _first("rmsnorm")
    ways = {
        "fails": fails,
        "serves_other_shapes": serves_other_shapes,
        "off_by_a_percent": off_by_a_percent,
        "good": workload.op.reference,
    }
    found = measure(workload, _setting(), TIMER, lambda op: ways)
    assert [row["implementation"] for row in found.rows] == ["good"]
    assert found.rows[0]["graph_seconds"] > 0  # it is short
    assert [text.split(": ")[1] for text in found.wrong] == ["fails", "off_by_a_percent"]
    title = workload.title
    assert found.missing == [f"{title}: serves_other_shapes: refuses, x must be longer"]


def test_rivals_are_compared_with_what_was_right():
    workload = _first("rmsnorm")
    rivals = {"refused": fails, "offered": lambda arguments: None, "eager": lambda a: lambda: None}
    rivalled = Workload(workload.op, workload.label, workload.make, rivals)
    ways = {"good": workload.op.reference, "off_by_a_percent": off_by_a_percent}
    rows = measure(rivalled, _setting(), TIMER, lambda op: ways).rows
    assert rows[0]["ratios"] == {}
    found = compare(rivalled, rivals, rows, _setting(), TIMER, lambda op: ways)
    assert found.missing == [f"{workload.title}: refused: does not run, planted"]
    assert rows[0]["ratios"].keys() == rows[0]["baselines"].keys() == {"eager"}
    assert 0 < rows[0]["ratios"]["eager"] < 1


def test_what_cannot_be_in_a_graph_is_timed_by_itself():
    class NoGraphs(HostClock):
        def graph(self, call):
            raise RuntimeError("it waits for the device")

    timer = Timer(CPU, 1, small=True)
    timer.clock = NoGraphs()
    workload = _first("rmsnorm")
    found = measure(workload, _setting(), timer, ways_on(CPU))
    assert found.wrong == []
    assert "not in a graph, it waits for the device" in found.missing[0]
    assert found.rows[0]["graph_seconds"] is None
    assert found.rows[0]["seconds"] > 0


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_what_comes_first_is_enough_for_every_goal(device):
    """The first pass alone, before any other workload and rival, measures all that goals read."""
    listed = [(w, own) for w, _, own in passes(workloads(small=False))]
    first = [w for w, own in listed if own and w.goal_rivals is not None]
    order = [w.goal_rivals is not None for w, own in listed if own]
    assert order == sorted(order, reverse=True)
    rows = [
        _row(
            w.op.name,
            1e-5,
            implementation=name,
            label=w.label,
            graph_seconds=1e-5,
            bytes_per_second=1e12,
            ratios=dict.fromkeys(w.goal_rivals, 1.5),
            tags=w.tags,
        )
        for w in first
        for name in stand_ins(w.op)
    ]
    verdicts = [goal.verdict(rows, Ceilings(3e12, 8e14)) for goal in goals(device)]
    assert [v["goal"] for v in verdicts if v["state"] == "not measured"] == []


def test_every_rival_comes_once_and_after_all_workloads():
    listed = list(passes(workloads(small=False)))
    kinds = [own for _, _, own in listed]
    assert kinds == sorted(kinds, reverse=True)
    pairs = [(w.title, rival) for w, rivals, _ in listed for rival in rivals]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {(w.title, r) for w in workloads(small=False) for r in w.rivals}


def test_a_broken_device_costs_one_row(tmp_path, monkeypatch, capsys):
    """An error that stays with a process, as of an illegal address: another measures the rest."""
    words = ["--device", "cpu", "--op", "merge", "rmsnorm", "--repeats", "1", "--seconds", "90"]
    words += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernels", *words])
    monkeypatch.setattr(kernels, "is_broken", lambda timer: True)
    real, broken = kernels.measure, []

    def breaks(workload, *others):
        if workload.op.name == "merge" and not broken:
            broken.append(workload.title)
            raise OSError("an illegal address")
        return real(workload, *others)

    monkeypatch.setattr(kernels, "measure", breaks)

    def again(program, command):
        assert command[:3] == [sys.executable, "-m", "benchmarks.kernels"]
        assert 0 < float(command[-1]) - time.monotonic() < 90
        raise SystemExit(main(command[3:]))

    monkeypatch.setattr("os.execv", again)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1  # something was wrong
    last = json.loads((tmp_path / "kernels.json").read_text())
    assert last["finished"]
    assert last["wrong"] == [f"{broken[0]}: OSError, an illegal address"]
    rows = [(row["op"], row["label"]) for row in last["rows"]]
    assert len(rows) == len(set(rows))
    small = [w for w in workloads(small=True) if w.op.name in ("merge", "rmsnorm")]
    assert {*rows} == {(w.op.name, w.label) for w in small} - {tuple(broken[0].split(" ", 1))}
    assert all(row["ratios"] for row in last["rows"])


class FakeEvent:
    def __init__(self, log):
        self.log = log

    def record(self):
        self.log.append("event")

    def elapsed_time(self, end):
        return 2.0

    def query(self):
        return False


def test_a_timed_call_finds_a_cache_that_was_read_and_not_written(monkeypatch):
    """What a flush writes would be written back while the call is timed."""
    log: list[str] = []
    timer = Timer(CPU, 4, small=True)
    monkeypatch.setattr(timer.clock, "event", lambda: FakeEvent(log))
    written = timer._flush._version
    monkeypatch.setattr(timer, "_flush", FlushLog(timer._flush, log))
    assert timer.seconds(lambda: log.append("call")) == 2e-3
    assert log[-16:] == ["read", "event", "call", "event"] * 4
    assert timer._flush.buffer._version == written
    log.clear()
    assert timer.graph_seconds(lambda: log.append("call")) == 2e-3 / 2
    assert "read" not in log


class FlushLog:
    def __init__(self, buffer, log):
        self.buffer, self.log = buffer, log

    def amax(self):
        self.log.append("read")
        return self.buffer.amax()


def test_every_workload_has_a_cost_and_passes_its_check():
    for workload in workloads(small=True):
        if workload.op.name in ("attention", "moe_experts"):  # slow beside other tests
            continue
        arguments = workload.make(_setting())
        assert workload.op.cost is not None
        assert workload.op.cost(**arguments).bytes > 0
        check(workload, workload.op.reference, arguments)


def _row(op: str, seconds: float, **facts) -> dict:
    tags = facts.pop("tags")
    made = {"op": op, "implementation": "portable", "seconds": seconds, "bytes": 1, "ratios": {}}
    made["graph_seconds"] = seconds
    return made | {"bytes_per_second": 0.0, "flops_per_second": 0.0, "tags": tags} | facts


def test_goals_are_met_short_or_not_measured():
    big = {"kv_bytes": 2**29, "width": 1, "model": "m", "batch": 64, "context": 4096}
    small = big | {"kv_bytes": 2**20, "page_size": 16}
    shared = {"batch": 64, "shared": 4096}
    rows = [
        *(
            _row(
                "decode", 1e-3 + page / 1e6, bytes_per_second=2.6e12, tags=big | {"page_size": page}
            )
            for page in (1, 16, 64)
        ),
        _row("decode", 1e-3, bytes_per_second=9.9e12, tags=small),
        _row("cascade", 1e-4, ratios={"plain decode": 9.0}, tags=shared | {"batch": 4}),
        _row("cascade", 1e-4, ratios={"plain decode": 2.5}, tags=shared),
        _row("rmsnorm", 5e-6, tags={"tokens": 64}),
        _row("rmsnorm", 1e-3, bytes_per_second=2.7e12, tags={"tokens": 4096}),
    ]
    ceilings = Ceilings(3.0e12, 8e14)

    def states(device: str) -> dict[str, str]:
        verdicts = [goal.verdict(rows, ceilings) for goal in goals(device)]
        return {verdict["goal"]: verdict["state"] for verdict in verdicts}

    h100, h200 = states("NVIDIA H100"), states("NVIDIA H200")
    assert h100["decode, GQA, >= 256 MB of KV"] == "met"
    assert h200["decode, GQA, >= 256 MB of KV"] == "short"
    assert h100["rmsnorm, <= 64 tokens, in a graph"] == "short"
    assert h100["rmsnorm, >= 4k tokens, of the copy rate"] == "met"
    assert h100["cascade, 4k shared prefix, batch 64"] == "short"
    assert h100["decode, page 16 over the best of 1, 16 and 64"] == "met"
    assert h100["qkv_prepare, <= 64 tokens, in a graph"] == "not measured"
    missing = ["qkv_prepare Qwen3-8B 1 tokens: portable: refuses, planted"]
    table = report.goal_table([g.verdict(rows, ceilings, missing) for g in goals("H200")])
    assert "short" in table
    assert "not measured: qkv_prepare Qwen3-8B 1 tokens: portable: refuses, planted" in table
    assert "not measured: no such row of sample" in table


def test_runs_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--op", "rmsnorm", "merge", "--repeats", "1"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    last = json.loads(run.stdout.splitlines()[-1])
    assert {row["op"] for row in last["rows"]} == {"rmsnorm", "merge"}
    assert not last["wrong"]
    names = {"kernels.json", "kernels.md", "roofline.png", "ratios.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_bars_show_one_shape_and_many(tmp_path):
    """The mean of a single ratio may lie below it, by a rounding error."""
    rows = [
        _row("rmsnorm", 1e-3, tags={}, flops=1, ratios={"eager": ratio})
        for ratio in (214.22, 158.8, 0.3)
    ]
    one = _row("merge", 1e-3, tags={}, flops=1, ratios={"eager": 0.1 + 0.2})
    paths = report.plot([*rows, one], Ceilings(3e12, 8e14), "title", tmp_path)
    assert [path.stat().st_size > 1000 for path in paths] == [True, True]


def test_what_comes_late_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    words = ["--device", "cpu", "--op", "merge", "--seconds", "-1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernels", *words])
    assert main() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"] == []
    title = "merge 2 states, 16 tokens, 16 heads of 128"
    assert last["late"] == [title, f"{title}: rivals"]
    assert json.loads((tmp_path / "kernels.json").read_text()) == last


def test_each_filter_of_sampling_has_a_goal_of_its_own():
    found = {goal.name: goal.target for goal in goals("H100")}
    for name, (target, _) in FILTERS.items():
        assert found[f"sampling 256 x 152k, {name}, over one read of the logits"] == target


def test_every_op_of_the_engine_has_a_workload():
    timed = {workload.op.name for workload in workloads(small=True)}
    assert timed == {workload.op.name for workload in workloads(small=False)}
    others = {"gelu_tanh_and_mul"}  # as silu_and_mul is
    assert timed == {op.name for op in all_ops()} - others


def test_large_workloads_leave_room_for_a_dense_copy():
    kv = [w.tags["kv_bytes"] for w in workloads(small=False) if w.op.name == "decode"]
    assert max(kv) < 9e9
    contexts = [w.tags["context"] for w in workloads(small=False) if w.op.name == "decode"]
    assert (min(contexts), max(contexts)) == (128, 131072)


def test_infinities_are_compared_by_place():
    workload = _first("mask_logits")
    arguments = workload.make(_setting())
    assert check(workload, workload.op.reference, arguments) == 0.0
    with pytest.raises(WrongResult):  # every token stays allowed
        check(workload, lambda logits, indices, bits: None, arguments)


def test_unknown_op_is_refused_by_name():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--op", "softmax"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "'softmax'" in run.stderr
