"""One rank's part of a profile: a torch-profiler trace, and device times on the host's clock."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minisgl.device import Device, Event
from minisgl.trace import record_details, record_with

ANCHOR_TRIES = 10


class RankProfiler:
    """Profiles what one device's stream runs. Owned by the thread that plans."""

    def __init__(self, device: Device, rank: int = 0, *, details: bool = False) -> None:
        """`details`: NVTX ranges for layers and ops too, whether a profile runs or not."""
        self._device = device
        self._rank = rank
        self._details = details
        self._anchor: tuple[Event, float] | None = None  # while a profile runs
        self._trace: Any = None
        if details:
            device.run(record_details)

    def start(self, *, traces: bool) -> None:
        """Give spans and, with `traces`, trace the stream from now on. It must be idle."""
        if traces:
            self._device.run(self._start)
        self._device.record().wait()
        self._anchor = self._device.run(self._now)

    def stop(self, directory: str) -> list[str]:
        """Write the trace, if there is one, and return its path. The stream must be idle.

        Raises OSError when it cannot be written.
        """
        self._anchor = None
        if self._trace is None:
            return []
        self._device.run(self._stop)
        trace, self._trace = self._trace, None
        path = Path(directory, f"rank{self._rank}.trace.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)  # another node may not have it
        path.touch()  # torch itself would only log that it could not write
        trace.export_chrome_trace(str(path))
        return [str(path)]

    def spans(self, events: Sequence[Event]) -> list[tuple[float, float]]:
        """(begin, end) of each pair of passed events, in seconds of the host's `perf_counter`.

        Empty where no profile runs.
        """
        if self._anchor is None:
            return []
        anchor, host = self._anchor
        times = [host + event.seconds_since(anchor) for event in events]
        return list(zip(times[::2], times[1::2], strict=True))

    def _start(self) -> None:
        """In the stream, whose thread is the one that torch then traces."""
        on_cuda = self._device.torch_device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
        self._trace = torch.profiler.profile(activities=kinds, record_shapes=True)
        self._trace.start()
        record_with(torch.profiler.record_function)

    def _stop(self) -> None:
        if self._details:
            record_details()
        else:
            record_with(None)
        self._trace.stop()

    def _now(self) -> tuple[Event, float]:
        """An event of the idle stream, and the host's time when it passed.

        That time lies between two readings of the clock; the closest of some pairs is taken.
        """
        pairs = []
        for _ in range(ANCHOR_TRIES):
            before = time.perf_counter()
            event = self._device.record()
            event.wait()
            after = time.perf_counter()
            pairs.append((after - before, event, (before + after) / 2))
        _, event, host = min(pairs, key=lambda pair: pair[0])
        return event, host
