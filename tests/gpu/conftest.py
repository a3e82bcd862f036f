"""Options of the tests on a GPU, their report, and a dry run that plays the GPU on the CPU.

    python -m pytest -m gpu tests/gpu                                    # on a GPU
    python -m pytest -m gpu tests/gpu --device cpu --stand-ins --out DIR

With --out, DIR/tests.json has a row for each test as soon as it ends. With --stand-ins kernels run
under Triton's interpreter, each on its first case, and engines run on the CPU; what only a GPU can
do is skipped by name.
"""

import math
import os
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.results import Results
from minisgl.kernels.all_reduce.virtual import QUEUES

# Before CUDA starts: streams that wait for each other must not share a hardware queue.
os.environ.update(QUEUES)

NOT_BEGUN = "not begun within"
END = pytest.StashKey[float]()  # of the time in which tests are begun


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU")
    group.addoption("--device", choices=("cuda", "cpu"), default="cuda")
    group.addoption("--stand-ins", action="store_true", help="play the GPU on the CPU")
    group.addoption("--only", help="only this implementation of each op")
    group.addoption("--without", help="not this implementation")
    group.addoption("--out", type=Path, help="folder for tests.json, which grows as tests end")
    group.addoption("--seconds", type=float, help="begin no test later than this")
    group.addoption("--commit", help="of this tree; default: what git says, if it is there")


def pytest_configure(config: pytest.Config) -> None:
    out, seconds = config.getoption("--out", None), config.getoption("--seconds", None)
    if stand_ins(config) != (config.getoption("--device", "cuda") == "cpu"):
        raise pytest.UsageError("--device cpu plays a GPU: it needs --stand-ins, and they need it")
    if stand_ins(config):
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    if seconds is not None:  # a process of xdist's, even one that replaces another, has no more
        worker = getattr(config, "workerinput", {})
        config.stash[END] = worker.get("end", time.monotonic() + seconds)
    if out is not None and not hasattr(config, "workerinput"):  # of xdist's processes the first
        args = Namespace(out=out, seconds=None, commit=config.getoption("--commit"))
        config.pluginmanager.register(Report(args, stand_ins(config)))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What xdist tells each of its processes."""
    if END in node.config.stash:
        node.workerinput["end"] = node.config.stash[END]


def stand_ins(config: pytest.Config) -> bool:
    return bool(config.getoption("--stand-ins", False))


@pytest.fixture(scope="session", autouse=True)
def _device_is_there(request: pytest.FixtureRequest) -> None:
    """One sentence where there is no GPU, instead of a failure for each test."""
    if not stand_ins(request.config) and not torch.cuda.is_available():
        pytest.exit("torch finds no CUDA device; --device cpu --stand-ins plays one", returncode=4)


@pytest.fixture(scope="session")
def device_type(request: pytest.FixtureRequest) -> str:
    """What engines and tensors are made on: "cuda", or its stand-in."""
    return "cpu" if stand_ins(request.config) else "cuda"


@pytest.fixture(scope="session")
def gpu_only(request: pytest.FixtureRequest) -> None:
    """For tests of what no CPU can play."""
    if stand_ins(request.config):
        pytest.skip("only a GPU has this: nothing stands in for it")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash.get(END, math.inf):
        pytest.skip(f"{NOT_BEGUN} {item.config.getoption('--seconds'):g} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Ends one of xdist's processes whose GPU refuses everything, as after an illegal address.

    Another takes its place. In this one every test to come would fail, and nobody would know which
    kernel it was: the test that is running is reported with the process.
    """
    report: pytest.TestReport = yield
    if report.failed and hasattr(item.config, "workerinput") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)
    return report


class Report:
    """Writes a row for every test that has ended, and which have begun and not ended."""

    def __init__(self, args: Namespace, stand_ins: bool) -> None:
        self.results = Results("tests", args)
        self.results.put(stand_ins=stand_ins, rows=[], running=[])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.results.add("running", nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self.results.content["running"]:
            self.results.content["running"].remove(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if NOT_BEGUN in why:
            self.results.add("late", report.nodeid)
        elif report.when == "call" or report.outcome != "passed":
            row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
            row["when"] = report.when
            row["seconds"] = round(report.duration, 3)
            row["why"] = "" if report.passed else why[-1000:]
            self.results.add("rows", row)

    def pytest_sessionfinish(self) -> None:
        outcomes = Counter(row["outcome"] for row in self.results.content["rows"])
        self.results.put(**outcomes, finished=True)
