"""`AsyncLLM`: the same answers as `LLM`, from an engine in its own process."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
from msgspec.structs import replace

from minisgl import LLM, AsyncLLM, SamplingParams
from minisgl.engine.client import EngineDeadError
from tests.llm.test_llm import GREEDY, OPTIONS


def test_it_answers_as_llm_does(model_directory: Path):
    prompts = ["one", "two, which is longer", [7, 8, 9]]
    seeded = SamplingParams(temperature=1.0, max_tokens=12, n=2, seed=5)
    with LLM(model_directory, **OPTIONS) as llm:
        greedy = llm.generate(prompts, GREEDY, use_tqdm=False)
        sampled = llm.generate("sampled", seeded, use_tqdm=False)
        chat = [{"role": "user", "content": "hello"}]
        answer = llm.chat(chat, GREEDY, use_tqdm=False)
    stop = next(c for c in greedy[0].text[2:] if c != "\ufffd")

    async def scene() -> None:
        async with AsyncLLM(model_directory, **OPTIONS) as llm:
            assert (await llm.ready()).limits.vocab_size == 350
            ours, single, cut = await asyncio.gather(
                llm.generate(prompts, GREEDY),
                llm.generate("sampled", seeded),
                llm.generate("one", replace(GREEDY, stop=(stop,), n=2)),
            )
            assert [o.token_ids for o in ours] == [o.token_ids for o in greedy]
            assert [c.text for c in single.outputs] == [c.text for c in sampled.outputs]
            assert {c.text for c in cut.outputs} == {greedy[0].text[: greedy[0].text.index(stop)]}
            assert {c.finish_reason for c in cut.outputs} == {"stop"}
            assert (await llm.chat(chat, GREEDY)).text == answer.text
            pieces = [piece async for piece in llm.stream("one", GREEDY)]
            assert "".join(pieces) == greedy[0].text
            async with aclosing(llm.stream("one", replace(GREEDY, max_tokens=200))) as left:
                await anext(left)
            with pytest.raises(ValueError, match=r"256.*300"):
                await llm.generate(["fine", [1] * 300], GREEDY)
            assert (await llm.generate("one", GREEDY)).token_ids == greedy[0].token_ids
        await llm.close()

    asyncio.run(asyncio.wait_for(scene(), 120))


def test_a_model_that_cannot_load_raises_where_it_is_first_used(tmp_path: Path):
    async def scene() -> None:
        llm = AsyncLLM(tmp_path / "nowhere", log_level="error", device="cpu")
        try:
            with pytest.raises(EngineDeadError, match="nowhere"):
                await llm.generate("x")
        finally:
            await llm.close()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_stuck_engine_is_an_error_at_once(model_directory: Path, monkeypatch):
    monkeypatch.setattr("minisgl.engine.client.IDLE_TIMEOUT", 2.0)

    async def scene() -> None:
        async with AsyncLLM(model_directory, **OPTIONS) as llm:
            before = await llm.generate("one", GREEDY)
            ours = ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())]
            listed = subprocess.run(ours, capture_output=True, text=True).stdout.splitlines()
            (line,) = (line for line in listed if "minisgl.engine.process" in line)
            os.kill(int(line.split()[0]), signal.SIGSTOP)
            for _ in range(2):  # the first waits until the engine counts as stuck
                with pytest.raises((EngineDeadError, RuntimeError), match="no progress"):
                    await llm.generate("one", GREEDY)
            os.kill(int(line.split()[0]), signal.SIGCONT)
            await asyncio.sleep(1.5)
            assert (await llm.generate("one", GREEDY)).token_ids == before.token_ids

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_options_are_checked_before_a_process_starts():
    with pytest.raises(TypeError, match="did you mean 'page_size'"):
        AsyncLLM(page_sise=1)


def test_importing_it_needs_no_torch():
    code = "import sys; from minisgl import AsyncLLM; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_another_event_loop_is_refused_at_once(model_directory):
    llm = AsyncLLM(model_directory, **OPTIONS)
    asyncio.run(llm.ready())

    async def again():
        with pytest.raises(RuntimeError, match="event loop of its first call"):
            await asyncio.wait_for(llm.generate("a"), 5)
        with pytest.raises(RuntimeError, match="event loop of its first call"):
            await asyncio.wait_for(llm.chat([{"role": "user", "content": "a"}]), 5)
        with pytest.raises(RuntimeError, match="event loop of its first call"):
            await asyncio.wait_for(llm.start_profile(), 5)
        await asyncio.wait_for(llm.close(), 20)

    asyncio.run(again())


@pytest.mark.parametrize("used", [False, True])
def test_a_closed_one_says_so(model_directory: Path, used: bool):
    async def scene() -> None:
        llm = AsyncLLM(model_directory, **OPTIONS)
        if used:
            await llm.ready()
        await llm.close()
        chat = [{"role": "user", "content": "a"}]
        for call in (llm.ready(), llm.generate("a"), llm.chat(chat), anext(llm.stream("a"))):
            with pytest.raises(RuntimeError, match="this AsyncLLM is closed"):
                await call
        await llm.close()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_start_that_fails_leaves_no_process(tmp_path: Path):
    async def scene() -> None:
        llm = AsyncLLM(tmp_path / "nowhere", log_level="error", device="cpu")
        with pytest.raises(EngineDeadError, match="nowhere"):
            async with llm:
                pass
        with pytest.raises(RuntimeError, match="this AsyncLLM is closed"):
            await llm.ready()

    asyncio.run(asyncio.wait_for(scene(), 60))
