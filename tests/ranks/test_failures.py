"""Ranks that die, fail or disagree: all end within seconds, with the reason, and no orphan."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from minisgl.build import build_engine
from minisgl.child import Child
from minisgl.config import EngineConfig
from minisgl.core.request import Delta, Request, SamplingParams
from minisgl.engine.engine import Engine
from minisgl.ranks import leader
from minisgl.ranks.channel import Boot, Channel
from minisgl.ranks.executor import ParallelExecutor
from minisgl.ranks.meeting import connect_to_listener, open_store
from minisgl.step.executor import LocalExecutor
from tests.ranks.processes import alive, children
from tests.world.configs import LLAMA

SECONDS = 30  # what "within seconds" may become on a machine that does much else
ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    facts = LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(facts | {"intermediate_size": 96}))
    return EngineConfig(
        model=str(tmp_path),
        load_format="dummy",
        device="cpu",
        dtype="float32",
        max_total_tokens=640,
        tp_size=2,
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begin(engine: Engine) -> None:
    params = SamplingParams(max_tokens=80, ignore_eos=True, temperature=0.0)
    engine.add(Request("r", [9, 8, 7], params))
    for _ in range(4):
        engine.step()


def run_to_failure(engine: Engine) -> list[Delta]:
    deltas: list[Delta] = []

    def failed() -> bool:
        deltas.extend(engine.step())
        return engine.failure is not None

    until(failed)
    return deltas


@pytest.mark.parametrize(
    ("busy", "by"),
    [
        (True, "shared"),
        pytest.param(True, "gloo", marks=pytest.mark.thorough),
        (False, "shared"),
    ],
)
def test_a_killed_rank_ends_them_all(
    config: EngineConfig, busy: bool, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "gloo":  # as where there is no compiler
        monkeypatch.setattr(leader.shared_memory, "available", lambda: False)
    before = children()
    engine = build_engine(_with(config, tp_size=3 if busy else 2))
    try:
        if busy:
            begin(engine)
        *others, last = sorted(children() - before)
        os.kill(last, signal.SIGKILL)
        deltas = run_to_failure(engine)
        reason = f"rank {len(others) + 1} ended with exit code -9 (Killed, signal 9)"
        assert reason in (engine.failure or "")
        if busy:
            assert deltas[-1].finish_reason == "error"
            assert reason in (deltas[-1].error or "")
        until(lambda: not any(map(alive, others)))  # before anybody closes the engine
    finally:
        engine.close()
    assert children() <= before


def _with(config: EngineConfig, **changes: object) -> EngineConfig:
    facts = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
    return EngineConfig(**(facts | changes))  # type: ignore[arg-type]


def other_boot(monkeypatch: pytest.MonkeyPatch, change: Callable[[Boot], Boot]) -> None:
    """Start ranks with something else than they should be."""
    start: Callable[[Boot], Child] = leader.start_rank
    monkeypatch.setattr(leader, "start_rank", lambda boot: start(change(boot)))


def test_a_rank_that_cannot_load_is_the_reason(config: EngineConfig, monkeypatch) -> None:
    other_boot(monkeypatch, lambda boot: msgspec.structs.replace(boot, path="/no/such/model"))
    before, threads = children(), threading.active_count()
    with pytest.raises(RuntimeError, match=r"rank 1 failed: .*/no/such/model"):
        build_engine(config)
    assert children() <= before
    until(lambda: threading.active_count() <= threads)


def test_a_rank_that_computes_something_else_is_found_when_debugging(
    config: EngineConfig, monkeypatch
) -> None:
    config = _with(config, log_level="debug")
    other = _with(config, random_seed=1)
    other_boot(monkeypatch, lambda boot: msgspec.structs.replace(boot, config=other))
    before = children()
    found = r"step \d+: the sum of the hidden states is -?\d+ on rank 1 and -?\d+ on rank 0"
    with pytest.raises(RuntimeError, match=found):
        build_engine(config)  # the steps that warm up are compared, too
    assert children() <= before


def wait_in_vain(*words: object) -> None:
    raise RuntimeError("the step failed: collectives were aborted")


def close_in_vain(executor: LocalExecutor) -> None:
    raise OSError("nor can it be closed")


class Rank:
    """Stands in for the process of one, which says nothing and hangs up when told to."""

    def __init__(self, boot: Boot) -> None:
        assert boot.channel is not None
        self.channel = Channel(socket.socket(fileno=os.dup(boot.channel)))
        self.closed = False

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def exit_reason(self, name: str) -> str:
        return f"{name} has had enough"

    def kill(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("wait", [lambda executor: executor.drafts(0), lambda e: e.collect()])
def test_whatever_rank_0_waits_for_the_rank_that_is_gone_is_the_reason(
    config: EngineConfig, wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Rank] = []
    comm = SimpleNamespace(abort=lambda: None, close=lambda: None)
    monkeypatch.setattr(leader, "start_rank", lambda boot: started.append(Rank(boot)) or started[0])
    monkeypatch.setattr(leader, "connect", lambda *words, **options: comm)
    others = leader.Ranks(2)
    others.start(config, ROOT, SimpleNamespace(torch_device=torch.device("cpu")))  # type: ignore[arg-type]
    (rank,) = started
    executor = ParallelExecutor(SimpleNamespace(device=None), others)  # type: ignore[arg-type]
    for name in ("collect", "drafts"):
        monkeypatch.setattr(LocalExecutor, name, wait_in_vain)
    monkeypatch.setattr(LocalExecutor, "close", close_in_vain)
    threading.Timer(0.1, rank.channel.close).start()  # known a bit later
    with pytest.raises(RuntimeError, match=r"^rank 1 has had enough$"):
        wait(executor)
    with pytest.raises(OSError, match="nor can it be closed"):
        executor.close()
    assert rank.closed  # the others are ended all the same


def test_nodes_that_take_each_others_ranks_are_told(config: EngineConfig, address: str) -> None:
    """Two nodes of three with one node_rank: their ranks come twice, the third's never."""
    config = _with(config, tp_size=3, nnodes=3, dist_init_addr=address)
    before, said = children(), []

    def build() -> None:
        try:
            build_engine(config)
        except RuntimeError as error:
            said.append(str(error))

    first = threading.Thread(target=build)
    first.start()
    store = open_store(config)
    address, key = store.get("channel").decode(), store.get("key")
    twice = [connect_to_listener(address, 1, key) for _ in range(2)]
    first.join(SECONDS)
    assert said == [
        "rank 1 connected, missing are [2]: is each node started with its own node_rank?"
    ]
    for rank in twice:  # sent away
        rank.wait_for_end()
        rank.close()
    assert children() <= before


PARENT = """
import sys, time
from minisgl.build import build_engine
from minisgl.config import EngineConfig
engine = build_engine(EngineConfig(
    model=sys.argv[1], load_format="dummy", device="cpu", max_total_tokens=640, tp_size=2
))
print("up", flush=True)
time.sleep(600)
"""


def test_ranks_do_not_outlive_rank_0(config: EngineConfig) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(config.model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        (rank,) = children(parent.pid)
        parent.kill()
    until(lambda: not alive(rank))
