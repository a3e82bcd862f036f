"""Servers on several ranks, as people start them: on one machine, and on two that are one here."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import msgspec
import pytest
import torch.distributed as dist

from minisgl import LLM, SamplingParams
from minisgl.config import EngineConfig
from minisgl.ranks.node import run_node
from tests.ranks.processes import alive, children
from tests.server.served import PATIENCE, Served

PROMPT = "What is tensor parallelism?"
FLAGS = ("--dtype=float32", "--max-running-requests=4")
BODY = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def answer() -> str:
    """What one rank says."""
    with LLM(dtype="float32", device="cpu", max_total_tokens=1024) as llm:
        return llm.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0.0)).text


def descendants(pid: int) -> set[int]:
    below = children(pid)
    return below.union(*(descendants(child) for child in below))


def ask(url: str) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=PATIENCE)
    return answer.json()["choices"][0]["text"]


@contextlib.contextmanager
def two_nodes(address: str) -> Iterator[tuple[Served, Served]]:
    """Both of them; the one that is not node 0 comes first, waits, and alone logs all there is."""
    nodes = (*FLAGS, "--tp-size=2", "--nnodes=2", f"--dist-init-addr={address}")
    with (
        contextlib.closing(Served(*nodes, "--node-rank=1", "--log-level=debug")) as other,
        contextlib.closing(Served(*nodes)) as first,
    ):
        yield first, other


def test_a_server_on_two_ranks_ends_them_on_sigterm(answer: str) -> None:
    with contextlib.closing(Served(*FLAGS, "--tp-size=2")) as server:
        assert ask(server.wait_ready()) == answer
        assert " on 2 x CPU" in server.output
        processes = descendants(server.process.pid)
        assert len(processes) == 2  # the engine with rank 0, and rank 1
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit() == 0, server.output
        assert not any(map(alive, processes))


def test_a_server_on_two_nodes(address: str, answer: str) -> None:
    with two_nodes(address) as (server, other):
        assert ask(server.wait_ready()) == answer
        processes = descendants(server.process.pid) | descendants(other.process.pid)
        server.process.send_signal(signal.SIGINT)
        assert server.wait_exit() == 0, server.output
        assert other.wait_exit() == 0, other.output
        assert not any(map(alive, processes))
        assert "node 1 of 2 with rank 1 waits for node 0" in other.output
        assert "was told to stop" in other.output


@pytest.mark.thorough
def test_a_node_that_is_lost_ends_the_others(address: str) -> None:
    with two_nodes(address) as (server, other):
        server.wait_ready()
        (rank,) = descendants(other.process.pid)
        os.kill(rank, signal.SIGKILL)
        assert server.wait_exit() == 1
        assert "rank 1, on another node, has ended" in server.output
        assert other.wait_exit() == 1
        assert "rank 1 ended with exit code -9" in other.output


def test_nodes_must_be_configured_alike(address: str) -> None:
    host, port = address.split(":")
    store = dist.TCPStore(
        host, int(port), is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    facts = {"tp_size": 2, "nnodes": 2, "dist_init_addr": address}
    store.set("config", msgspec.msgpack.encode(EngineConfig(**facts, page_size=32)))
    with pytest.raises(ValueError, match="page_size must be 32 as on node 0, got 16"):
        run_node(EngineConfig(**facts, node_rank=1, log_level="error"), Path("/no/such/model"))


def test_a_node_alone_can_be_stopped(address: str) -> None:
    nodes = ("--tp-size=2", "--nnodes=2", "--node-rank=1", f"--dist-init-addr={address}")
    with contextlib.closing(Served(*nodes)) as node:
        while "waits for node 0" not in node.output:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.process.wait(0.05)
            assert node.process.poll() is None, node.output
        node.process.send_signal(signal.SIGINT)
        assert node.wait_exit() == 0, node.output
        assert "Traceback" not in node.output
