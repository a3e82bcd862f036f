"""The client: routing, refusals, and what they say when an engine is slow or gone."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from minisgl.core.batch import Batch
from minisgl.core.executor import Failed, Profiled
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.client import EngineDeadError
from minisgl.engine.loop import drive
from minisgl.engine.messages import (
    Abort,
    Deltas,
    Drain,
    FromEngine,
    Rejected,
    StartProfile,
    Status,
    StopProfile,
    Submit,
    ToEngine,
)
from tests.engine.clients import collect, open_client, open_engine, play, until
from tests.world.engine import expected, make_engine

FOREVER = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


def test_concurrent_requests_get_their_own_tokens():
    async def scene():
        async with open_client() as client:
            assert client.health().ok
            assert client.info.limits.page_size == 16
            params = SamplingParams(max_tokens=30, ignore_eos=True, seed=2**64 - 1, n=3)
            requests = [Request(f"r{i}", [i, i + 1, 7], params) for i in range(20)]
            for request, deltas in zip(
                requests, await asyncio.gather(*(collect(client, r) for r in requests)), strict=True
            ):
                for choice in range(3):
                    mine = [delta for delta in deltas if delta.choice == choice]
                    got = [token for delta in mine for token in delta.token_ids]
                    assert got == expected(request, choice)
                    assert [d.finish_reason for d in mine][-1] == "length"
            await until(lambda: client.stats().output_tokens == 20 * 30 * 3)

    play(scene())


def test_a_refusal_is_a_value_error_with_the_numbers():
    async def scene():
        async with open_client() as client:
            with pytest.raises(ValueError, match=r"256.*300"):
                await collect(client, Request("long", [1] * 300, SamplingParams()))
            params = SamplingParams(structured_outputs={"regex": "x"})
            with pytest.raises(ValueError, match="structured_outputs is not supported"):
                await collect(client, Request("g", [1], params))
            stream = client.submit(Request("twice", [1], FOREVER))
            await anext(stream)
            with pytest.raises(ValueError, match="'twice' is already in use"):
                await collect(client, Request("twice", [1], FOREVER))
            await stream.aclose()

    play(scene())


def test_an_aborted_choice_is_silent_and_the_others_go_on():
    async def scene():
        async with open_client("seconds=0.001") as client:
            params = SamplingParams(max_tokens=60, ignore_eos=True, seed=1, n=2)
            request = Request("a", [1, 2, 3], params)
            tokens: dict[int, list[int]] = {0: [], 1: []}
            aborted = False
            async for delta in client.submit(request):
                assert not (aborted and delta.choice == 0)
                tokens[delta.choice] += delta.token_ids
                if len(tokens[0]) >= 5 and not aborted:
                    client.abort("a", 0)
                    client.abort("a", 0)
                    aborted = True
            assert tokens[1] == expected(request, 1)
            assert 5 <= len(tokens[0]) < 60
            client.abort("a")  # it has ended: nothing happens

    play(scene())


def test_aborting_a_whole_request_ends_its_stream():
    async def scene():
        async with open_client("seconds=0.01") as client:
            count = 0
            async for _ in client.submit(Request("a", [1, 2, 3], FOREVER)):
                count += 1
                if count == 3:
                    client.abort("a")
            assert count == 3
            await until(lambda: client.stats().scheduler.num_running == 0)

    play(scene())


def test_a_consumer_that_leaves_aborts_its_request():
    async def scene():
        async with open_client("seconds=0.01") as client:
            async with aclosing(client.submit(Request("a", [1, 2, 3], FOREVER))) as deltas:
                await anext(deltas)
            task = asyncio.create_task(collect(client, Request("b", [1, 2, 3], FOREVER)))
            await until(lambda: client.stats() is not None and client.stats().steps > 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: client.stats().scheduler.num_running == 0)
            assert client.stats().output_tokens < 200

    play(scene())


def test_a_failed_step_reaches_every_request_with_its_reason():
    async def scene():
        async with open_client("fail_at=5") as client:
            requests = [Request(name, [1, 2, 3], FOREVER) for name in "abc"]
            for deltas in await asyncio.gather(*(collect(client, r) for r in requests)):
                assert deltas[-1].finish_reason == "error"
                assert "planted fault" in deltas[-1].error
            assert "planted fault" in await client.failed()
            assert client.health().state == "dead"
            with pytest.raises(EngineDeadError, match="planted fault"):
                await collect(client, Request("d", [1], FOREVER))

    play(scene())


def test_an_engine_that_cannot_load_says_why():
    async def scene():
        with pytest.raises(EngineDeadError, match="planted: the model cannot be loaded"):
            async with open_client("refuse=1"):
                pass

    play(scene())


def test_a_drain_finishes_what_runs_and_refuses_the_rest():
    async def scene():
        async with open_client("seconds=0.005") as client:
            request = Request("a", [1, 2, 3], FOREVER)
            running = asyncio.create_task(collect(client, request))
            await until(lambda: client.stats() is not None and client.stats().steps > 0)
            closing = asyncio.create_task(client.close(drain_timeout=30))
            await asyncio.sleep(0)
            assert client.health().state == "draining"
            with pytest.raises(EngineDeadError, match="shutting down"):
                await collect(client, Request("late", [1], FOREVER))
            tokens = [token for delta in await running for token in delta.token_ids]
            assert tokens == expected(request)
            await closing

    play(scene())


def test_a_drain_is_bounded_by_its_timeout():
    async def scene():
        async with open_client("seconds=0.05") as client:
            running = asyncio.create_task(collect(client, Request("a", [1, 2, 3], FOREVER)))
            await until(lambda: client.stats() is not None and client.stats().steps > 0)
            await client.close(drain_timeout=0.2)
            assert (await running)[-1].finish_reason in ("abort", "error")

    play(scene())


def test_a_killed_process_fails_its_requests_at_once_and_says_how_it_died():
    async def scene():
        async with open_engine("seconds=0.01") as (process, client):
            running = asyncio.create_task(collect(client, Request("a", [1, 2, 3], FOREVER)))
            await until(lambda: client.stats() is not None and client.stats().steps > 0)
            os.kill(process.pid, signal.SIGKILL)
            deltas = await asyncio.wait_for(running, timeout=5)
            assert deltas[-1].finish_reason == "error"
            assert "exit code -9" in deltas[-1].error
            assert "Killed" in await client.failed()
            assert client.health().state == "dead"

    play(scene())


def test_a_native_crash_while_loading_is_reported_with_the_last_lines(capfd):
    async def scene():
        with pytest.raises(EngineDeadError, match=r"exit code -11(.|\n)*planted: last words"):
            async with open_client("crash=1"):
                pass

    play(scene())
    assert "planted: last words" in capfd.readouterr().err


class Gone:
    def write(self, text: str) -> None:
        raise OSError("the terminal was closed")


@pytest.mark.parametrize("stderr", [Gone(), None])
def test_an_engine_that_says_much_needs_nobody_to_hear_it(monkeypatch, stderr):
    async def scene():
        async with open_client(f"says={1 << 20}") as client:  # far more than a pipe holds
            assert client.health().ok

    monkeypatch.setattr("sys.stderr", stderr)
    play(scene())


def test_a_loop_says_that_it_is_busy_before_its_first_step_and_goes_on_saying_so(monkeypatch):
    monkeypatch.setattr("minisgl.engine.loop.HEARTBEAT", 0.0)
    engine = make_engine()
    inbox = [[Submit(Request("a", [1], SamplingParams(max_tokens=3, ignore_eos=True)))]]
    said: list[FromEngine] = []
    dispatch = engine.executor.dispatch
    before_steps = []

    def watched(batch: Batch) -> None:
        before_steps.append(next(m for m in reversed(said) if isinstance(m, Status)))
        dispatch(batch)

    engine.executor.dispatch = watched
    assert drive(lambda: engine, lambda _: inbox.pop() if inbox else [Drain(60.0)], said.append)
    assert len(before_steps) == 3
    assert all(status.busy for status in before_steps)
    assert [status.stats.steps for status in before_steps] == [0, 0, 1]
    assert not said[-1].busy


def serve(engine, *inbox: list[ToEngine]) -> tuple[bool, list[FromEngine]]:
    """What `drive` returns and says but for its status, when these messages come, then a drain."""
    waiting, said = list(inbox), list[FromEngine]()
    ended_well = drive(
        lambda: engine, lambda _: waiting.pop(0) if waiting else [Drain(60.0)], said.append
    )
    return ended_well, [message for message in said if not isinstance(message, Status)]


@pytest.mark.parametrize("question", [StartProfile(None, True), StopProfile()])
def test_a_step_that_fails_while_a_profile_changes_is_told_to_all(tmp_path, question):
    """The request under way, the one behind it in the same inbox, and whoever asked: those two as
    by an engine that has stopped, not as refusals of what was asked."""
    engine = make_engine(fail_at=2, profile_dir=str(tmp_path))
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    first, late = (Request(name, [1], params) for name in ("first", "late"))
    started = [StartProfile(None, True)] if isinstance(question, StopProfile) else []
    behind = [question, Submit(late), StopProfile()]
    ended_well, said = serve(engine, [*started, Submit(first)], [], [], behind)
    assert not ended_well
    assert not [message for message in said if isinstance(message, Profiled) and message.refusal]
    (rejected,) = [message for message in said if isinstance(message, Rejected)]
    assert (rejected.request_id, rejected.stopped) == ("late", True)
    assert "planted fault" in rejected.reason
    (end,) = [d for m in said if isinstance(m, Deltas) for d in m.deltas if d.finish_reason]
    assert (end.request_id, end.finish_reason) == ("first", "error")
    assert isinstance(said[-1], Failed)
    assert "planted fault" in said[-1].reason


@pytest.mark.parametrize("broken", ["add", "abort", "step", "stats"])
def test_every_way_out_of_the_loop_but_a_drain_ends_with_the_reason(monkeypatch, broken):
    def fail(*args: object) -> None:
        raise KeyError("planted: nobody foresaw this")

    monkeypatch.setattr("minisgl.engine.loop.HEARTBEAT", 0.0)
    engine = make_engine()
    setattr(engine, broken, fail)
    request = Request("a", [1], SamplingParams(max_tokens=3))
    ended_well, said = serve(engine, [Submit(request)], [Abort("a", None)])
    assert not ended_well
    assert isinstance(said[-1], Failed)
    assert "nobody foresaw this" in said[-1].reason


def test_an_engine_that_cannot_be_closed_has_said_why_it_failed():
    def fail() -> None:
        raise KeyError("planted: nobody foresaw this")

    engine = make_engine(fail_at=0)
    engine.close = fail
    ended_well, said = serve(engine, [Submit(Request("a", [1], SamplingParams(max_tokens=3)))])
    assert not ended_well
    assert isinstance(said[-1], Failed)
    assert "planted fault" in said[-1].reason


def test_the_socket_lies_in_a_private_directory_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scene():
        async with open_client():
            (mine,) = tmp_path.iterdir()
            assert mine.stat().st_mode & 0o777 == 0o700
        assert not mine.exists()

    play(scene())


UNCLOSED = """
from minisgl.config import EngineConfig
from minisgl.engine.process import EngineProcess
process = EngineProcess("tests.world.engine:build", EngineConfig())
"""


@pytest.mark.parametrize("name", ["x" * 100, "x" * 80, "é" * 45])
def test_a_temporary_directory_may_have_a_long_name(tmp_path, monkeypatch, name):
    """A socket's name has at most 107 bytes."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))

    async def scene():
        async with open_client() as client:
            assert await collect(client, Request("a", [1], SamplingParams(max_tokens=3)))

    play(scene())


def test_it_goes_away_though_nobody_closes_the_process(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", UNCLOSED], env=env, check=True)
    assert list(tmp_path.iterdir()) == []


PARENT = """
import sys, time
from minisgl.config import EngineConfig
from minisgl.engine.process import EngineProcess
process = EngineProcess("tests.world.engine:build", EngineConfig())
print(process.pid, flush=True)
time.sleep(60)
"""


def test_a_parent_that_dies_takes_its_engine_with_it(tmp_path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=env)
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in status(child):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "State:\tZ"
