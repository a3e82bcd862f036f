"""What the CUDA device asks of its streams, in order, with stand-ins for torch.cuda's objects.

No kernel runs: the stand-ins take down who waits for whom. What they cannot show is for tests/gpu.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from minisgl.device import cuda
from minisgl.kernels.config import batch_invariant, fixed_order


class World:
    """Streams named 0, 1, ... as they are made, and everything that happens on them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = self.events = 0
        self.current = "none"
        self.passed: set[str] = set()
        self.graphs: list[object] = []
        self.broken = False  # as a capture is in which something forbidden was called
        self.pinned = 0  # times that pinned memory was asked for
        self.lost = False  # as a device is that has read where nothing is

    def patch(self, monkeypatch) -> None:
        world = self

        class Stream:
            def __init__(self, device):
                self.name = f"stream{world.streams}"
                world.streams += 1

            def wait_event(self, event):
                world.log.append(f"{self.name} waits for {event.name}")

            def wait_stream(self, other):
                world.log.append(f"{self.name} waits for {other.name}")

            def synchronize(self):
                world.log.append(f"host waits for {self.name}")
                if world.lost:
                    raise RuntimeError("an illegal memory access was encountered")

        class Event:
            def __init__(self, enable_timing):
                self.name = f"event{world.events}"
                world.events += 1

            def record(self, stream):
                world.log.append(f"{stream.name} records {self.name}")

            def query(self):
                return self.name in world.passed

            def synchronize(self):
                world.log.append(f"host waits for {self.name}")

        class Graph:
            def __init__(self):
                world.graphs.append(self)

            def capture_begin(self, pool, capture_error_mode):
                world.log.append(f"capture on {world.current}")

            def capture_end(self):
                world.log.append("captured")
                if world.broken:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                world.log.append(f"replay {world.graphs.index(self)}")

        @contextmanager
        def on(stream):
            before, world.current = world.current, stream.name
            yield
            world.current = before

        def copy_(target, source, non_blocking=False):
            assert non_blocking
            world.log.append(f"copy on {world.current}")
            return copy(target, source)

        def empty_(*shape, pin_memory=False, **facts):
            world.pinned += pin_memory
            return empty(*shape, **facts)

        copy, empty = torch.Tensor.copy_, torch.empty
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        monkeypatch.setattr(torch, "empty", empty_)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "stream": on,
            "graph_pool_handle": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def take(self) -> list[str]:
        log, self.log = self.log, []
        return log


@pytest.fixture
def world(monkeypatch):
    made = World()
    made.patch(monkeypatch)
    return made


@pytest.fixture
def device(world):
    made = cuda.CudaDevice()
    made.torch_device = torch.device("cpu")
    world.take()
    return made


def test_an_upload_runs_in_the_computing_stream(world, device):
    place = torch.zeros(5, dtype=torch.int32)
    sent = device.run(device.upload, np.array([4, 5], np.int32), place)
    assert world.take() == ["copy on stream0"]
    assert world.pinned == 1
    assert place.tolist() == [4, 5, 0, 0, 0]
    assert sent is place
    assert device.run(device.upload, np.array([7], np.int32)).tolist() == [7]


def test_a_download_follows_the_work_and_holds_nobody(world, device):
    got = device.run(device.download, torch.arange(3))
    assert world.take() == [
        "stream0 records event0",
        "stream1 waits for event0",
        "copy on stream1",
    ]
    assert got.tolist() == [0, 1, 2]
    assert world.pinned == 1
    event = device.landed()
    assert world.take() == [
        "stream0 records event1",
        "stream1 waits for event1",
        "stream1 records event2",
    ]
    event.wait()
    assert world.take() == ["host waits for event2"]
    device.run(device.await_downloads)
    assert world.take() == ["stream0 waits for stream1"]


def test_work_is_run_once_before_it_is_captured(world, device):
    device.run(device.capture, lambda: world.log.append("work"))
    assert world.take() == [
        "work",
        "host waits for stream0",
        "capture on stream0",
        "work",
        "captured",
    ]


def test_pieces_are_captured_one_after_another_and_replayed_around_what_is_cut_out(world, device):
    def work(cut):
        world.log.append("work 0")
        with fixed_order():
            cut(lambda value: world.log.append(f"{value} {batch_invariant()}"))
        world.log.append("work 1")
        cut(lambda value: world.log.append(f"{value + 1} {batch_invariant()}"))
        world.log.append("work 2")

    pieces = device.run(device.capture_pieces, work)
    once = ["work 0", "work 1", "work 2"]
    between = ["captured", "capture on stream0"]
    captured = ["capture on stream0", "work 0", *between, "work 1", *between, "work 2", "captured"]
    assert world.take() == [*once, "host waits for stream0", *captured]
    for value in (5, 7):
        device.run(pieces.replay, value)
        assert world.take() == [
            "replay 0", f"{value} True", "replay 1", f"{value + 1} False", "replay 2",
        ]  # fmt: skip


def test_a_capture_that_fails_is_ended(world, device):
    def work(cut):
        cut(print)
        if "capture on stream0" in world.log:
            raise ValueError("in the second piece")

    with pytest.raises(ValueError, match="in the second piece"):
        device.run(device.capture_pieces, work)
    log = world.take()
    assert log.count("capture on stream0") == log.count("captured") == 2


def test_what_breaks_a_capture_is_what_is_raised(world, device):
    def work():
        if "capture on stream0" in world.log:
            world.broken = True
            raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        device.run(device.capture, work)
    assert world.take().count("captured") == 1
    with pytest.raises(RuntimeError, match="previous error"):  # where the function said nothing
        device.run(device.capture, lambda: None)


def test_an_interrupt_reaches_the_caller_and_ends_the_stream(world, device):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.submit(interrupted)
    device.submit(world.log.append, "ran")
    assert "ran" not in world.take()
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        device.record().wait()


def test_a_device_that_has_failed_can_be_closed(world, device, caplog):
    world.lost = True
    device.close()
    assert world.take() == ["host waits for stream0"]
    assert "illegal memory access" in caplog.text
    device.close()


def test_a_failure_skips_what_follows_and_is_raised_by_events(world, device):
    good = device.record()
    device.submit(lambda: 1 / 0)
    device.submit(world.log.append, "ran")
    good.wait()
    assert "ran" not in world.take()
    for event in (device.record(), device.landed()):
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            event.wait()
    device.close()
    assert world.take()[-2:] == ["host waits for stream0", "host waits for stream1"]
    with pytest.raises(RuntimeError, match="closed"):
        device.submit(world.log.append, "ran")
