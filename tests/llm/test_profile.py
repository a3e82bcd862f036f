"""Profiles of a real model: device times on the host's clock, overlap seen, traces of every op."""

import asyncio
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from minisgl import LLM, AsyncLLM, SamplingParams, chat
from tests.llm.test_llm import OPTIONS

SLACK = 1e3  # microseconds that the device's clock may be off
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
WORK = [[i, i + 1, i + 2] for i in range(8)]


def timeline_of(directory: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Begin and end by step, for each part but the outermost."""
    content = json.loads(Path(directory, "timeline.json").read_text())
    spans: dict[str, dict[int, tuple[float, float]]] = {}
    for event in content["traceEvents"]:
        if event["ph"] == "X" and event["name"] != "step":
            begin = event["ts"]
            of_part = spans.setdefault(event["name"], {})
            of_part[event["args"]["step"]] = (begin, begin + event["dur"])
    return spans


@pytest.mark.parametrize("overlap", [True, False])
def test_plans_lie_beside_device_work_with_overlap_and_never_without(tmp_path, overlap):
    options = {**OPTIONS, "load_format": "auto", "disable_overlap_schedule": not overlap}
    with LLM(profile_dir=str(tmp_path), **options) as llm:
        llm.generate(WORK, LONG, use_tqdm=False)
        directory = llm.start_profile(traces=False)
        llm.generate(WORK, LONG, use_tqdm=False)
        assert llm.stop_profile() == [f"{directory}/timeline.json"]
    spans = timeline_of(directory)
    steps = sorted(spans["forward"])
    assert len(steps) >= 40
    assert all(sorted(spans[name]) == steps for name in ("sample", "dispatch", "collect", "update"))
    beside = 0
    for step in steps:
        begin, end = spans["forward"][step][0], spans["sample"][step][1]
        assert spans["forward"][step][1] <= spans["sample"][step][0]
        assert spans["dispatch"][step][0] <= begin + SLACK
        assert end <= spans["collect"][step][1] + SLACK
        if step > steps[0]:
            assert spans["sample"][step - 1][1] <= begin
        if step + 1 in spans["plan"]:
            plan = spans["plan"][step + 1]
            beside += begin < plan[1] and plan[0] < end
    assert beside >= len(steps) / 4 if overlap else beside == 0


def test_traces_hold_every_step_layer_and_op_and_end_with_the_profile(tmp_path, model_directory):
    with LLM(model_directory, profile_dir=str(tmp_path), **OPTIONS) as llm:
        expected = llm.generate(WORK[0], LONG, use_tqdm=False).token_ids
        for _ in range(2):  # profiles leave nothing behind
            directory = llm.start_profile(5)
            assert llm.generate(WORK[0], LONG, use_tqdm=False).token_ids == expected
            with gzip.open(f"{directory}/rank0.trace.json.gz") as file:
                events = json.load(file)["traceEvents"]
            names = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
            assert names["forward"] == names["patch"] == names["accept_and_advance"] == 5
            assert names["layer 0"] == names["layer 1"] == 5
            assert names["silu_and_mul"] == 10
            assert any(e["name"] == "aten::index_select" for e in events)
            assert set(timeline_of(directory)["forward"]) == set(timeline_of(directory)["sample"])
        llm.close()
        for change in (llm.start_profile, llm.stop_profile):
            with pytest.raises(RuntimeError, match="closed"):
                change()


def test_an_async_llm_profiles_the_engine_in_its_process(tmp_path, model_directory):
    async def scene() -> None:
        async with AsyncLLM(model_directory, profile_dir=str(tmp_path), **OPTIONS) as llm:
            directory = await llm.start_profile(traces=False)
            await llm.generate(WORK[0], LONG)
            with pytest.raises(ValueError, match="running already"):
                await llm.start_profile()
            assert await llm.stop_profile() == [f"{directory}/timeline.json"]
            assert len(timeline_of(directory)["forward"]) == 40

    asyncio.run(scene())


def test_a_chat_starts_and_ends_profiles(tmp_path, monkeypatch, capsys):
    lines = ["/profile", "hello", "/profile", "/exit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    flags = ["--max-tokens=4", "--max-total-tokens=2048", "--device=cpu"]
    assert chat.main([*flags, f"--profile-dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    (directory,) = tmp_path.iterdir()
    assert f"profiling into {directory}" in said
    assert f"{directory}/timeline.json\n{directory}/rank0.trace.json.gz\n" in said
    assert timeline_of(str(directory))["forward"]


def test_a_chat_without_a_directory_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("/profile\n"))
    assert chat.main(["--max-total-tokens=2048", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert "profile_dir is not set" in err
    assert chat.HELP_PROFILE not in out
