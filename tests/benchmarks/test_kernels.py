"""The kernel benchmark checks what it times, names what is wrong, and judges goals."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.kernels import report
from benchmarks.kernels.__main__ import main, time_workload
from benchmarks.kernels.check import WrongResult, check
from benchmarks.kernels.goals import goals
from benchmarks.kernels.timing import Ceilings
from benchmarks.kernels.workload import Setting, Workload
from benchmarks.kernels.workloads import workloads
from minisgl.kernels.op import Implementation, Op
from tests.kernels.cards import all_ops

CPU = torch.device("cpu")


def _setting() -> Setting:
    return Setting(CPU, torch.bfloat16, torch.Generator().manual_seed(0))


def _first(name: str) -> Workload:
    return next(w for w in workloads(small=True) if w.op.name == name)


def off_by_a_percent(x, *args, **kwargs):
    return 1.01 * _first("rmsnorm").op.reference(x, *args, **kwargs)


def last_key_forgotten(q, k_pool, v_pool, page_table, rows, seq_lens, **kwargs):
    return _first("decode").op.reference(
        q, k_pool, v_pool, page_table, rows, seq_lens - 1, **kwargs
    )


@pytest.mark.parametrize(
    ("name", "wrong"), [("rmsnorm", off_by_a_percent), ("decode", last_key_forgotten)]
)
def test_wrong_kernel_is_not_timed(name, wrong):
    workload = _first(name)
    path = f"{__name__}:{wrong.__name__}"
    sys.modules.setdefault(__name__, sys.modules[wrong.__module__])
    planted = Op(name, workload.op.reference, [Implementation("planted", "cpu", path)])
    with pytest.raises(WrongResult, match="planted"):
        check(
            Workload(planted, workload.label, workload.make), "planted", workload.make(_setting())
        )
    assert check(workload, "reference", workload.make(_setting())) < 0.02


def fails(*args, **kwargs):
    raise OSError("planted")


def serves_other_shapes(*args, **kwargs):
    raise ValueError("x must be longer")


def test_a_failing_implementation_stops_no_other():
    workload = _first("rmsnorm")
    sys.modules.setdefault(__name__, sys.modules[fails.__module__])
    listed = [
        Implementation(name, "cpu", f"{__name__}:{name}")
        for name in ("fails", "serves_other_shapes", "off_by_a_percent")
    ]
    listed.append(Implementation("good", "cpu", "minisgl.kernels.rmsnorm:rmsnorm_reference"))
    planted = Op("rmsnorm", workload.op.reference, listed)
    refused = {"refused": fails, "offered": lambda arguments: None}
    found = time_workload(Workload(planted, "shape", workload.make, refused), _setting(), 1)
    assert [row["implementation"] for row in found.rows] == ["good"]
    assert [text.split(": ")[1] for text in found.wrong] == ["fails", "off_by_a_percent"]
    assert found.missing == [
        "rmsnorm shape: refused: does not run, planted",
        "rmsnorm shape: serves_other_shapes: refuses, x must be longer",
    ]
    again = time_workload(
        Workload(planted, "shape", workload.make), _setting(), 1, ["fails", "off_by_a_percent"]
    )
    assert len(again.rows) == 1
    assert again.wrong == []


def test_every_workload_has_a_cost_and_passes_its_check():
    for workload in workloads(small=True):
        if workload.op.name in ("attention", "moe_experts"):  # slow beside other tests
            continue
        arguments = workload.make(_setting())
        assert workload.op.cost is not None
        assert workload.op.cost(**arguments).bytes > 0
        check(workload, "reference", arguments)


def _row(op: str, seconds: float, **facts) -> dict:
    tags = facts.pop("tags")
    made = {"op": op, "implementation": "portable", "seconds": seconds, "bytes": 1, "ratios": {}}
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
    assert h100["rmsnorm, <= 64 tokens"] == "short"
    assert h100["rmsnorm, >= 4k tokens, of the copy rate"] == "met"
    assert h100["cascade, 4k shared prefix, batch 64"] == "short"
    assert h100["decode, page 16 over the best of 1, 16 and 64"] == "met"
    assert h100["rotary, <= 64 tokens"] == "not measured"
    missing = ["rotary Qwen3-8B 1 tokens: portable: refuses, planted"]
    table = report.goal_table([g.verdict(rows, ceilings, missing) for g in goals("H200")])
    assert "short" in table
    assert "not measured: rotary Qwen3-8B 1 tokens: portable: refuses, planted" in table
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
    assert last["missing"] == ["merge 2 states, 16 tokens, 16 heads of 128: not begun within -1 s"]
    assert json.loads((tmp_path / "kernels.json").read_text()) == last


def test_every_op_of_the_engine_has_a_workload():
    timed = {workload.op.name for workload in workloads(small=True)}
    assert timed == {workload.op.name for workload in workloads(small=False)}
    assert timed == {op.name for op in all_ops()} - {"gelu_tanh_and_mul"}  # as silu_and_mul


def test_large_workloads_leave_room_for_a_dense_copy():
    kv = [w.tags["kv_bytes"] for w in workloads(small=False) if w.op.name == "decode"]
    assert max(kv) < 9e9
    contexts = [w.tags["context"] for w in workloads(small=False) if w.op.name == "decode"]
    assert (min(contexts), max(contexts)) == (128, 131072)


def test_infinities_are_compared_by_place():
    workload = _first("mask_logits")
    arguments = workload.make(_setting())
    assert check(workload, "reference", arguments) == 0.0
    monkeyed = Op("mask_logits", workload.op.reference, [_planted("mask_nothing")])
    with pytest.raises(WrongResult):
        check(Workload(monkeyed, "shape", workload.make), "mask_nothing", arguments)


def mask_nothing(logits, indices, bits) -> None:
    """Wrong: every token stays allowed."""


def _planted(name: str) -> Implementation:
    sys.modules.setdefault(__name__, sys.modules[mask_nothing.__module__])
    return Implementation(name, "cpu", f"{__name__}:{name}")


def test_unknown_op_is_refused_by_name():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--op", "softmax"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "'softmax'" in run.stderr
