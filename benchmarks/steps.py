"""An engine in this process whose steps are recorded: loading, driving, comparing tokens."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import GrammarMasks
from minisgl.core.request import Delta
from minisgl.core.scheduler import Scheduler
from minisgl.device import Device, pick_device
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo
from minisgl.models.hub import model_directory
from minisgl.start.facts import Facts, read_facts
from minisgl.start.load import load_worker
from minisgl.step.executor import LocalExecutor, plan_on_one_thread
from minisgl.step.worker import Worker

Tokens = dict[str, list[int]]  # by request


@dataclass
class Noted:
    """A collected step."""

    batch: Batch
    launch_seconds: float  # of the host, in `dispatch` and `sample`
    output: StepOutput
    collected: float  # the host's clock

    @property
    def prefills(self) -> bool:
        return self.batch.num_decode < len(self.batch.chunks)


class Recorder:
    """An executor that notes what its steps took."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self._launched: deque[tuple[Batch, float]] = deque()
        self.steps: list[Noted] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def dispatch(self, batch: Batch) -> None:
        began = time.perf_counter()
        self._executor.dispatch(batch)
        self._launched.append((batch, time.perf_counter() - began))

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        began = time.perf_counter()
        self._executor.sample(step, masks)
        batch, seconds = self._launched.pop()
        self._launched.append((batch, seconds + time.perf_counter() - began))

    def collect(self) -> StepOutput:
        output = self._executor.collect()
        self.steps.append(Noted(*self._launched.popleft(), output, time.perf_counter()))
        return output


@contextmanager
def open_device(name: str) -> Iterator[Device]:
    """The device; on a CPU this thread, which plans beside it, keeps to one core."""
    device = pick_device(name)
    if device.torch_device.type == "cpu":
        plan_on_one_thread()
    try:
        yield device
    finally:
        device.close()


def load(config: EngineConfig, device: Device) -> tuple[Facts, Worker]:
    folder = BUNDLED_MODEL
    if config.model is not None:
        folder = model_directory(config.model, weights=config.load_format != "dummy")
    facts = read_facts(config, folder, device)
    return facts, load_worker(facts, device)


def recorded(
    executor: LocalExecutor, config: EngineConfig, **options: Any
) -> tuple[Engine, Recorder]:
    """A new engine, scheduling as `config` says and made with `options`, and its recorder."""
    limits = executor.limits
    recorder = Recorder(executor)
    info = EngineInfo("benchmark", "", "", "", "", [], limits)
    return Engine(Scheduler(limits, config), recorder, info, **options), recorder


def step(engine: Engine) -> list[Delta]:
    """One step. RuntimeError when it fails."""
    deltas = engine.step()
    if engine.failure is not None:
        raise RuntimeError(engine.failure)
    return deltas


def drain(engine: Engine) -> None:
    """Let go of all requests."""
    engine.abort_all()
    while engine.has_work():
        engine.step()


def equal_share(outputs: dict[str, Tokens], exact: bool) -> float:
    """The share of tokens equal to the first way's, the least of all ways.

    RuntimeError where all must be equal and are not, ValueError where there are fewer of them.
    """
    name, *others = outputs
    want = outputs[name]
    least = 1.0
    for other in others:
        pairs = [
            (a, b) for key in want for a, b in zip(want[key], outputs[other][key], strict=True)
        ]
        share = sum(a == b for a, b in pairs) / len(pairs)
        if exact and share < 1:
            raise RuntimeError(f"tokens differ between {name!r} and {other!r}: {share:.1%} equal")
        least = min(least, share)
    return least
