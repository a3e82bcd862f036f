"""An engine that makes no progress: /health says so, nothing hangs, and it may go on later."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from minisgl.core.request import Request, SamplingParams
from minisgl.engine.client import EngineDeadError, ProcessClient
from minisgl.engine.messages import FromEngine, Ready, Status
from tests.engine.clients import collect, open_engine, play, until
from tests.world.engine import expected, make_engine

FOREVER = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


class Unplugged:
    """A process without an engine: the test says what its client hears, and when."""

    def __init__(self) -> None:
        self.socket, self._other = (zmq.Context.instance().socket(zmq.PAIR) for _ in "ab")
        self.socket.bind(f"inproc://{id(self)}")
        self._other.connect(f"inproc://{id(self)}")

    def say(self, message: FromEngine) -> None:
        self._other.send(msgspec.msgpack.encode(message))

    def on_exit(self, callback: Callable[[], object]) -> None:
        pass


@pytest.mark.parametrize(
    ("busy", "longest", "patience"),
    [
        (False, 0.0, 3.0),  # an idle loop gives signs of life, however patient the watchdog is
        (True, 0.0, 50.0),  # nothing is known of its steps: the watchdog's own timeout
        (True, 2.0, 50.0),
        (True, 7.0, 70.0),  # ten times what a step is known to take
    ],
)
def test_how_long_a_silent_loop_counts_as_alive(monkeypatch, busy, longest, patience):
    now = 1000.0
    monkeypatch.setattr("minisgl.engine.client.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("minisgl.engine.client.IDLE_TIMEOUT", 3.0)
    engine = make_engine()
    stats = msgspec.structs.replace(engine.stats(), longest_step=longest)

    async def scene():
        nonlocal now
        process = Unplugged()
        client = ProcessClient(process, watchdog_timeout=50.0)
        process.say(Ready(engine.info))
        process.say(Status(busy, stats))
        await client.ready()
        await until(lambda: client.stats() is not None)
        now += patience
        assert client.health().ok
        now += 0.1
        assert client.health().state == "stuck"
        process.say(Status(busy, stats))
        await until(lambda: client.health().ok)

    play(scene())


def test_health_notices_a_stopped_process_busy_or_idle_and_recovers():
    async def scene():
        async with open_engine("seconds=0.001", watchdog_timeout=2.0) as (process, client):
            for _ in range(2):
                os.kill(process.pid, signal.SIGSTOP)
                await until(lambda: client.health().state == "stuck")
                assert "no progress" in client.health().reason
                os.kill(process.pid, signal.SIGCONT)
                await until(lambda: client.health().ok)
                await collect(client, Request("a", [1, 2], FOREVER))

    play(scene())


@asynccontextmanager
async def stopped(process, client):
    """The engine stopped by the system, from when its client calls it stuck."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        await until(lambda: client.health().state == "stuck")
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_a_stuck_engine_ends_what_runs_and_refuses_what_comes():
    async def scene():
        opened = open_engine("seconds=0.02", watchdog_timeout=1.0)
        async with opened as (process, client):
            params = msgspec.structs.replace(FOREVER, n=2)
            running = [
                asyncio.create_task(collect(client, Request(name, [1, 2, 3], params)))
                for name in "ab"
            ]
            await until(lambda: client.stats() is not None and client.stats().steps > 0)
            async with stopped(process, client):
                before = time.monotonic()
                for question in (
                    collect(client, Request("new", [1], FOREVER)),
                    client.start_profile(),
                    client.stop_profile(),
                ):
                    with pytest.raises(EngineDeadError, match="no progress"):
                        await question
                assert time.monotonic() - before < 0.5  # not one more look at the engine
                for deltas in await asyncio.gather(*running):
                    ends = [delta for delta in deltas if delta.finish_reason]
                    assert sorted(delta.choice for delta in ends) == [0, 1]
                    assert all("no progress" in delta.error for delta in ends)
            await until(lambda: client.health().ok)
            # What had been asked for was aborted, and its late tokens reach nobody.
            request = Request("c", [4, 5], SamplingParams(max_tokens=9, ignore_eos=True, seed=2))
            tokens = [
                token for delta in await collect(client, request) for token in delta.token_ids
            ]
            assert tokens == expected(request)
            await until(lambda: client.stats().scheduler.num_running == 0)
            assert client.stats().output_tokens < 400

    play(scene())


def test_a_profile_asked_for_as_the_engine_stops_does_not_hang():
    async def scene():
        async with open_engine(watchdog_timeout=1.0) as (process, client):
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(EngineDeadError, match="no progress"):
                await client.start_profile()
            os.kill(process.pid, signal.SIGCONT)
            await until(lambda: client.health().ok)
            with pytest.raises(ValueError, match="profile_dir"):  # this question's own answer
                await client.start_profile()

    play(scene())


def test_a_client_that_stood_still_does_not_call_its_engine_stuck():
    """As after a stop of both from the terminal: what was said meanwhile is yet to be read."""

    async def scene():
        async with open_engine("seconds=0.02", watchdog_timeout=1.0) as (_, client):
            request = Request("a", [1, 2, 3], FOREVER)
            running = asyncio.create_task(collect(client, request))
            await until(lambda: client.stats() is not None and client.stats().steps > 0)
            time.sleep(2.5)
            assert [t for delta in await running for t in delta.token_ids] == expected(request)

    play(scene())
