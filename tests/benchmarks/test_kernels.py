"""The kernel benchmark checks what it times, names what is wrong, and judges goals."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.kernels import report
from benchmarks.kernels.__main__ import time_workload
from benchmarks.kernels.check import WrongResult, check
from benchmarks.kernels.goals import goals
from benchmarks.kernels.timing import Ceilings
from benchmarks.kernels.workloads import Setting, Workload, workloads
from minisgl.kernels.op import Implementation, Op

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


def test_a_failing_implementation_stops_no_other(capsys):
    workload = _first("rmsnorm")
    sys.modules.setdefault(__name__, sys.modules[fails.__module__])
    listed = [
        Implementation(name, "cpu", f"{__name__}:{name}")
        for name in ("fails", "serves_other_shapes", "off_by_a_percent")
    ]
    listed.append(Implementation("good", "cpu", "minisgl.kernels.rmsnorm:rmsnorm_reference"))
    planted = Op("rmsnorm", workload.op.reference, listed)
    rows, wrong = time_workload(Workload(planted, "shape", workload.make), _setting(), 1)
    assert [row["implementation"] for row in rows] == ["good"]
    assert [text.split(": ")[1] for text in wrong] == ["fails", "off_by_a_percent"]
    assert "serves_other_shapes refuses, x must be longer" in capsys.readouterr().out
    again, wrong = time_workload(
        Workload(planted, "shape", workload.make), _setting(), 1, ["fails", "off_by_a_percent"]
    )
    assert len(again) == 1
    assert wrong == []


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
    big = {"kv_bytes": 2**29, "width": 1}
    small = {"kv_bytes": 2**20, "width": 1}
    rows = [
        _row("decode", 1e-3, bytes_per_second=2.6e12, tags=big),
        _row("decode", 1e-3, bytes_per_second=9.9e12, tags=small),
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
    assert h100["cascade, 4k shared prefix, batch 64"] == "not measured"
    assert "short" in report.goal_table([g.verdict(rows, ceilings) for g in goals("H200")])


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


def test_unknown_op_is_refused_by_name():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--op", "softmax"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "'softmax'" in run.stderr
