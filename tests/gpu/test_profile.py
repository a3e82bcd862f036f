"""Profiles on a GPU: event times on the host's clock, kernels in the trace, overlap seen."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

# A machine for kernels alone may lack the engine's packages.
pytest.importorskip("triton")
pytest.importorskip("msgspec")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("zmq")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from minisgl import LLM, SamplingParams

pytestmark = pytest.mark.gpu

SLACK = 1e3  # microseconds that the device's clock may be off
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
WORK = [[i, i + 1, i + 2] for i in range(8)]


@pytest.mark.parametrize("overlap", [True, False])
def test_device_spans_lie_between_dispatch_and_collect(
    tmp_path: Path, overlap: bool, device_type: str
) -> None:
    options: dict[str, Any] = {"device": device_type, "max_total_tokens": 4096}
    options["profile_dir"] = str(tmp_path)
    with LLM(disable_overlap_schedule=not overlap, **options) as llm:
        llm.generate(WORK, LONG, use_tqdm=False)
        directory = llm.start_profile(traces=False)
        llm.generate(WORK, LONG, use_tqdm=False)
        llm.stop_profile()
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for event in json.loads(Path(directory, "timeline.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            times = event["ts"], event["ts"] + event["dur"]
            found.setdefault(event["name"], {})[event["args"]["step"]] = times
    steps = sorted(found["forward"])
    assert len(steps) >= 40
    beside = 0
    for step in steps:
        begin, end = found["forward"][step][0], found["sample"][step][1]
        assert found["dispatch"][step][0] <= begin + SLACK
        assert end <= found["collect"][step][1] + SLACK
        if step + 1 in found["plan"]:
            plan = found["plan"][step + 1]
            beside += begin < plan[1] and plan[0] < end
    assert (beside > 0) == overlap  # a CPU's shortest steps end before many plans begin


@pytest.mark.usefixtures("gpu_only")
def test_a_trace_holds_kernels(tmp_path: Path) -> None:
    with LLM(device="cuda", max_total_tokens=4096, profile_dir=str(tmp_path)) as llm:
        llm.generate(WORK, LONG, use_tqdm=False)
        llm.start_profile()
        llm.generate(WORK, LONG, use_tqdm=False)
        (_, trace) = llm.stop_profile()
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) >= 40
