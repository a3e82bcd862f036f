"""Profiles of an engine: when they start and stop, what a timeline holds, what is refused."""

import asyncio
import json
from contextlib import aclosing
from pathlib import Path

import pytest

from minisgl.config import EngineConfig
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.client import EngineDeadError, ProcessClient
from minisgl.engine.process import EngineProcess
from tests.world.engine import expected, make_engine

TEN = SamplingParams(max_tokens=10, ignore_eos=True, seed=1)


def spans_of(directory: str) -> list[dict]:
    """The complete events of a timeline, with their ends."""
    content = json.loads(Path(directory, "timeline.json").read_text())
    events = [event for event in content["traceEvents"] if event["ph"] == "X"]
    return [{**event, "end": event["ts"] + event["dur"]} for event in events]


def run(engine, request: Request) -> list[int]:
    engine.add(request)
    tokens = []
    while engine.has_work():
        tokens += [token for delta in engine.step() for token in delta.token_ids]
    return tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_the_timeline_holds_every_part_of_every_step_nested(tmp_path, overlap):
    engine = make_engine(overlap=overlap, profile_dir=str(tmp_path))
    before = len(run(engine, Request("before", [1, 2, 3], TEN)))
    directory = engine.start_profile()
    request = Request("a", [4, 5, 6], TEN)
    assert run(engine, request) == expected(request)
    files = engine.stop_profile()
    run(engine, Request("after", [7, 8], TEN))
    assert files == [f"{directory}/timeline.json", f"{directory}/rank0.trace.json"]
    spans = spans_of(directory)
    steps = range(before, before + 10)  # a step gives one token here
    for name in ("dispatch", "collect", "update", "forward", "sample"):
        assert [e["args"]["step"] for e in spans if e["name"] == name] == list(steps), name
    planned = [e["args"]["step"] for e in spans if e["name"] == "plan"]
    assert sorted(set(planned) & set(steps)) == list(steps)
    outer = [event for event in spans if event["name"] == "step"]
    for event in spans:
        if event["tid"] == 1 and event["name"] != "step":
            inside = [o for o in outer if o["ts"] <= event["ts"] and event["end"] <= o["end"]]
            assert len(inside) == 1, event
    for event in spans:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        if event["name"] == "forward":
            assert event["tid"] == 2
            assert event["args"]["sequences"] == 1
    tokens = [event["args"]["tokens"] for event in spans if event["name"] == "forward"]
    assert tokens == [3] + [1] * 9


@pytest.mark.parametrize("overlap", [False, True])
def test_a_profile_of_so_many_steps_ends_by_itself(tmp_path, overlap):
    engine = make_engine(overlap=overlap, profile_dir=str(tmp_path))
    engine.add(Request("a", [1], TEN))
    directory = engine.start_profile(4, traces=False)
    while engine.has_work():
        engine.step()
    collected = [e["args"]["step"] for e in spans_of(directory) if e["name"] == "collect"]
    assert collected == [0, 1, 2, 3]
    assert [path.name for path in Path(directory).iterdir()] == ["timeline.json"]
    with pytest.raises(ValueError, match=rf"profile_dir: no profile is running.* {directory}"):
        engine.stop_profile()


def test_profiles_of_one_second_have_directories_of_their_own(tmp_path):
    engine = make_engine(profile_dir=str(tmp_path / "made" / "here"))
    directories = []
    for _ in range(3):
        directories.append(engine.start_profile())
        engine.stop_profile()
    assert len(set(directories)) == 3
    assert {Path(d) for d in directories} == set((tmp_path / "made" / "here").iterdir())


def test_what_cannot_be_is_refused_by_name(tmp_path):
    for change in ("start_profile", "stop_profile"):
        with pytest.raises(ValueError, match="profile_dir is not set"):
            getattr(make_engine(), change)()
    engine = make_engine(profile_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no profile is running"):
        engine.stop_profile()
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        engine.start_profile(0)
    directory = engine.start_profile()
    with pytest.raises(ValueError, match=f"running already, into {directory}"):
        engine.start_profile()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"profile_dir: cannot make .*file: File exists"):
        make_engine(profile_dir=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"profile_dir: cannot make .*Not a directory"):
        make_engine(profile_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="profile_dir must name a folder, got ''"):
        EngineConfig(profile_dir="")


def test_a_profile_that_cannot_be_written_is_refused_and_the_engine_goes_on(tmp_path):
    engine = make_engine(profile_dir=str(tmp_path))
    Path(engine.start_profile()).rmdir()
    with pytest.raises(ValueError, match="profile_dir: cannot write"):
        engine.stop_profile()
    Path(engine.start_profile(2)).rmdir()
    request = Request("a", [1, 2], TEN)
    assert run(engine, request) == expected(request)
    engine.start_profile()
    assert len(engine.stop_profile()) == 2


def test_no_file_is_written_before_a_profile_is_asked_for(tmp_path):
    engine = make_engine(profile_dir=str(tmp_path))
    run(engine, Request("a", [1, 2, 3], TEN))
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_an_engine_writes_the_profile_that_runs(tmp_path):
    engine = make_engine(profile_dir=str(tmp_path))
    directory = engine.start_profile()
    engine.add(Request("a", [1, 2, 3], TEN))
    for _ in range(3):
        engine.step()
    engine.close()
    assert [e["args"]["step"] for e in spans_of(directory) if e["name"] == "collect"] == [0, 1, 2]


def test_a_failed_engine_has_no_profile_to_start_and_says_why(tmp_path):
    engine = make_engine(profile_dir=str(tmp_path), fail_at=1)
    engine.add(Request("a", [1, 2, 3], TEN))
    engine.step()
    engine.step()  # step 1 is in flight
    with pytest.raises(RuntimeError, match="planted fault"):
        engine.start_profile()
    assert engine.failure is not None
    assert engine.step()[-1].finish_reason == "error"
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_client_starts_and_stops_profiles_of_a_running_engine(tmp_path):
    config = EngineConfig(profile_dir=str(tmp_path), model="seconds=0.001")

    async def scene():
        client = ProcessClient(EngineProcess("tests.world.engine:build", config))
        await client.ready()
        with pytest.raises(ValueError, match="no profile is running"):
            await client.stop_profile()
        request = Request("a", [1, 2, 3], TEN)
        tokens: list[int] = []
        async with aclosing(client.submit(request)) as deltas:
            async for delta in deltas:
                if not tokens:
                    directory = await client.start_profile()
                tokens += delta.token_ids
        answers = await asyncio.gather(  # in the order of the questions
            client.start_profile(), client.stop_profile(), return_exceptions=True
        )
        assert "running already" in str(answers[0])
        assert answers[1] == [f"{directory}/timeline.json", f"{directory}/rank0.trace.json"]
        assert tokens == expected(request)
        spans = spans_of(directory)
        assert {"plan", "collect", "forward"} <= {event["name"] for event in spans}
        await client.close()
        with pytest.raises(EngineDeadError):
            await client.start_profile()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_an_engine_that_dies_answers_who_waits_for_a_profile(tmp_path):
    config = EngineConfig(profile_dir=str(tmp_path), model="seconds=0.2,fail_at=0")

    async def scene():
        client = ProcessClient(EngineProcess("tests.world.engine:build", config))
        await client.ready()
        stream = client.submit(Request("a", [1, 2, 3], TEN))
        first = asyncio.create_task(anext(stream))
        while client.stats() is None or not client.stats().scheduler.num_waiting:
            await asyncio.sleep(0.01)  # until its first step is under way
        with pytest.raises((EngineDeadError, ValueError), match="planted fault"):
            await client.start_profile()
        assert (await first).finish_reason == "error"
        await stream.aclose()
        await client.close()

    asyncio.run(asyncio.wait_for(scene(), 60))
