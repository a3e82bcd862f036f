"""An engine's profile: what its own thread does in a step, and when the device is busy.

The step timeline is Chrome's trace event format, which https://ui.perfetto.dev opens. Its times are
microseconds of `time.perf_counter` since the profile began, on every device, so a CPU shows as
well as a GPU whether planning overlaps computing. What happens inside the device's steps is in the
executor's traces, written beside it.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from minisgl import trace
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import Executor
from minisgl.engine.messages import EngineInfo

HOST, DEVICE = 1, 2  # thread ids of the timeline
PARTS = ("forward", "sample")  # what the device does of a step, as in `StepOutput.spans`


class Profiler:
    """Starts and stops profiles of one engine, and records its steps while one runs."""

    def __init__(self, directory: str | None, executor: Executor, info: EngineInfo) -> None:
        """ValueError, naming profile_dir, where `directory` cannot be made."""
        self._parent = directory
        if directory is not None:
            _make(Path(directory), exist_ok=True)
        self._executor = executor
        self._info = info
        self._events: list[dict[str, Any]] | None = None  # None: no profile runs
        self._directory: Path | None = None  # of the last profile
        self._began = 0.0
        self._until: int | None = None  # the first step that is not recorded

    @property
    def running(self) -> bool:
        return self._events is not None

    def complete(self, next_step: int) -> bool:
        """Whether a profile runs whose steps come before `next_step`."""
        return self.running and self._until is not None and next_step >= self._until

    def check(self, *, running: bool) -> None:
        """Raises ValueError where profiles have no directory, or the state is not `running`."""
        if self._parent is None:
            raise ValueError(
                "profile_dir is not set: start the engine with --profile-dir to write profiles"
            )
        if self.running and not running:
            raise ValueError(f"profile_dir: a profile is running already, into {self._directory}")
        if running and not self.running:
            ended = f"; the last one is in {self._directory}" if self._directory else ""
            raise ValueError(f"profile_dir: no profile is running{ended}")

    def start(self, next_step: int, num_steps: int | None, traces: bool) -> str:
        """Begin a profile with nothing in flight; the new directory its files will be in.

        Raises ValueError where `check` does or there can be no such directory.
        """
        self.check(running=False)
        assert self._parent is not None
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self._until = None if num_steps is None else next_step + num_steps
        directory = self._directory = _new_directory(Path(self._parent))
        self._executor.start_profile(traces=traces)
        self._events = [
            _name("process_name", HOST, f"{self._info.model} on {self._info.device}"),
            _name("thread_name", HOST, "planner"),
            _name("thread_name", DEVICE, "device"),
        ]
        self._began = time.perf_counter()
        return str(directory)

    def stop(self) -> list[str]:
        """End the profile with nothing in flight; the files it wrote: timeline first, then ranks.

        Raises ValueError where `check` does or a file cannot be written.
        """
        self.check(running=True)
        assert self._events is not None
        assert self._directory is not None
        timeline = self._directory / "timeline.json"
        content = {"traceEvents": self._events, "displayTimeUnit": "ms"}
        self._events = None
        try:
            traces = self._executor.stop_profile(str(self._directory))
            timeline.write_bytes(msgspec.json.encode(content))
        except OSError as error:
            raise ValueError(f"profile_dir: cannot write {self._directory}: {error}") from error
        return [str(timeline), *traces]

    def span(self, name: str, step: int) -> trace.Range:
        """The range of a part of `step` in the engine's thread."""
        if self._events is None:
            return trace.span(name)
        return self._recorded(name, step)

    @contextmanager
    def _recorded(self, name: str, step: int) -> Iterator[None]:
        """The range, which ends up in the timeline too, even if the part fails."""
        with trace.span(name):
            begin = time.perf_counter()
            try:
                yield
            finally:
                self.add(name, HOST, begin, time.perf_counter(), step=step)

    def collected(self, batch: Batch, output: StepOutput) -> None:
        """Record when the device worked on `batch`."""
        if self._events is None:
            return
        arguments = {
            "sequences": len(batch.chunks),
            "decode": batch.num_decode,
            "tokens": batch.num_tokens,
        }
        for name, (begin, end) in zip(PARTS, output.spans, strict=True):
            self.add(name, DEVICE, begin, end, step=batch.step, **arguments)

    def add(self, name: str, thread: int, begin: float, end: float, **arguments: int) -> None:
        """Record a span; its times are of `time.perf_counter`."""
        assert self._events is not None  # it starts and stops between steps
        self._events.append(
            {
                "name": name,
                "ph": "X",
                "pid": 1,
                "tid": thread,
                "ts": round((begin - self._began) * 1e6, 3),
                "dur": round((end - begin) * 1e6, 3),
                "args": arguments,
            }
        )


def _name(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}


def _new_directory(parent: Path) -> Path:
    """A directory named by the time, and by a number where there is one already."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in itertools.chain([stamp], (f"{stamp}-{n}" for n in itertools.count(2))):
        if not (parent / name).exists():
            break
    _make(parent / name)
    return parent / name


def _make(directory: Path, exist_ok: bool = False) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise ValueError(f"profile_dir: cannot make {directory}: {error.strerror}") from error
