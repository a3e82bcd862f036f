"""A client of an engine process without a model, and bounded waits."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from minisgl.config import EngineConfig
from minisgl.core.request import Delta, Request
from minisgl.engine.client import ProcessClient
from minisgl.engine.process import EngineProcess

FACTORY = "tests.world.engine:build"


@asynccontextmanager
async def open_engine(
    planted: str = "", *, watchdog_timeout: float = 60.0
) -> AsyncIterator[tuple[EngineProcess, ProcessClient]]:
    process = EngineProcess(FACTORY, EngineConfig(model=planted))
    client = ProcessClient(process, watchdog_timeout=watchdog_timeout)
    try:
        await client.ready()
        yield process, client
    finally:
        await client.close()


@asynccontextmanager
async def open_client(planted: str = "") -> AsyncIterator[ProcessClient]:
    async with open_engine(planted) as (_, client):
        yield client


async def collect(client, request: Request) -> list[Delta]:
    return [delta async for delta in client.submit(request)]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


def play(scene: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scene, timeout=60)

    asyncio.run(bounded())
