"""Ranks that die while all of them connect: the others end within seconds and leave nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.processes import of_session
from tests.ranks.test_failures import SECONDS, until

ROOT = Path(__file__).parents[2]
FACTS = {"device": "cpu", "max_total_tokens": 640, "tp_size": 2}
KILLED = "ended with exit code -9 (Killed, signal 9)"
LAST_CALL = 5  # that gloo makes to the store; then its sockets connect

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start():
    """Starts `tests.ranks.dying`, and sees to it that nothing of it is left."""
    started: list[subprocess.Popen[str]] = []

    def start(mortal: str, shared: bool = True, **facts: Any) -> subprocess.Popen[str]:
        environment = os.environ | {"MORTAL": mortal} | ({} if shared else WITHOUT)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.dying", json.dumps(FACTS | facts)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    left = [pid for process in started for pid in of_session(process.pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()
    assert not left


WITHOUT = {"WITHOUT_SHARED_MEMORY": "1"}


def end_of(process: "subprocess.Popen[str]") -> str:
    """What it said, once it and all that it started have ended."""
    output, _ = process.communicate(timeout=2 * SECONDS)  # its start included
    until(lambda: not of_session(process.pid))
    assert process.returncode == 1, output
    return output


@pytest.mark.parametrize(
    ("calls", "shared"),
    [(0, True), pytest.param(1, False, marks=pytest.mark.thorough), (LAST_CALL, False)],
)
def test_a_rank_that_dies_ends_rank_0(start: Start, calls: int, shared: bool) -> None:
    output = end_of(start(f"1:{calls}", shared))
    assert f"ended: rank 1 {KILLED}" in output


@pytest.mark.parametrize(
    ("mortal", "reason"),
    [
        ("1:-1", f"ended: node 1: rank 1 {KILLED}"),
        pytest.param(
            f"1:{LAST_CALL}",
            "ended: rank 1, on another node, has ended",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_rank_that_dies_ends_all_nodes(
    start: Start, address: str, mortal: str, reason: str
) -> None:
    nodes = {"nnodes": 2, "dist_init_addr": address}
    other, first = start(mortal, **nodes, node_rank=1), start(mortal, **nodes)
    assert reason in end_of(first)
    assert f"ended: rank 1 {KILLED}" in end_of(other)


def test_rank_0_that_dies_ends_all_nodes(start: Start, address: str) -> None:
    nodes = {"nnodes": 2, "dist_init_addr": address}
    other, first = start("0:1", **nodes, node_rank=1), start("0:1", **nodes)
    first.communicate(timeout=2 * SECONDS)
    assert first.returncode == -signal.SIGKILL
    assert "rank 0 has ended" in end_of(other)
