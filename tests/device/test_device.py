"""The CPU as a device: order, events, failures, an end that may come twice."""

import math
import mmap
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from minisgl.device import CpuDevice, pick_device
from minisgl.device.cpu import (
    default_num_threads,
    give_back_freed_memory,
    keep_freed_memory,
    lazy_zeros,
    left_of_quota,
)


def streams() -> set[threading.Thread]:
    """The living threads of CPU devices."""
    return {thread for thread in threading.enumerate() if thread.name == "minisgl-stream"}


@pytest.fixture
def device():
    made = CpuDevice(num_threads=1)
    yield made
    made.close()


def test_functions_run_in_order_on_one_thread(device: CpuDevice):
    seen, threads = [], set()

    def note(number: int) -> None:
        threads.add(threading.current_thread())
        seen.append(number)

    for number in range(100):
        device.submit(note, number)
    device.record().wait()
    assert seen == list(range(100))
    assert len(threads) == 1
    assert threads <= streams()


def test_submit_does_not_wait_and_events_tell_when(device: CpuDevice):
    gate = threading.Event()
    before = device.record()
    device.submit(gate.wait)
    after = device.record()
    before.wait()
    waiting = threading.Thread(target=after.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    gate.set()
    waiting.join(10)
    assert not waiting.is_alive()
    assert after.seconds_since(before) > 0


def test_event_times_measure_the_work_between(device: CpuDevice):
    begin = device.record()
    device.submit(time.sleep, 0.02)
    end = device.record()
    device.submit(time.sleep, 0.05)
    device.record().wait()
    assert end.seconds_since(begin) >= 0.02


def test_failure_surfaces_with_its_traceback_and_skips_what_follows(device: CpuDevice):
    ran = []

    def explode() -> None:
        raise KeyError("planted")

    good = device.record()
    device.submit(explode)
    device.submit(ran.append, 1)
    event = device.record()
    good.wait()
    with pytest.raises(RuntimeError, match="planted") as caught:
        event.wait()
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    assert "explode" in "".join(traceback.format_exception(cause))
    assert not ran
    with pytest.raises(RuntimeError, match="planted"):
        device.record().wait()


def test_run_returns_or_raises_and_poisons_nothing(device: CpuDevice):
    assert device.run(lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(ZeroDivisionError):
        device.run(lambda: 1 / 0)
    device.record().wait()
    assert device.run(lambda: device.run(lambda: 7)) == 7  # from inside the stream


def test_close_finishes_the_work_and_is_idempotent():
    before, device = streams(), CpuDevice(num_threads=1)
    assert streams() > before
    done = []
    device.submit(time.sleep, 0.01)
    device.submit(done.append, 1)
    device.close()
    device.close()
    assert done == [1]
    assert streams() == before
    with pytest.raises(RuntimeError, match="closed"):
        device.submit(done.append, 2)


def test_a_failed_device_closes():
    before, device = streams(), CpuDevice(num_threads=1)
    device.submit(lambda: 1 / 0)
    device.close()
    assert streams() == before


def test_stream_keeps_its_threads_when_the_planner_has_one():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        device = CpuDevice(num_threads=2)
        assert device.run(torch.get_num_threads) == 2
        assert torch.get_num_threads() == 1
        device.close()
    finally:
        torch.set_num_threads(before)


def test_host_copies_and_zeros(device: CpuDevice):
    array = np.arange(6, dtype=np.int32)
    assert device.run(device.upload, array).tolist() == list(range(6))
    zeros = device.run(device.zeros, (3, 5, 7), torch.bfloat16)
    assert zeros.shape == (3, 5, 7)
    assert zeros.dtype == torch.bfloat16
    assert zeros.data_ptr() % 64 == 0
    assert not zeros.any()


def test_graph_replays_on_static_buffers(device: CpuDevice):
    x, y = torch.zeros(3), torch.zeros(3)
    graph = device.run(device.capture, lambda: torch.add(x, 1, out=y))
    for value in (1.0, 5.0):
        x.fill_(value)
        device.submit(graph.replay)
        device.record().wait()
        assert y.tolist() == [value + 1] * 3


def test_memory_is_measured(device: CpuDevice):
    assert 0 < device.free_memory() < 2**50


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_freed_memory_between_what_stays_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    keep_freed_memory()
    parts = [(np.ones(2**17), np.ones(100)) for _ in range(64)]
    held = resident()
    kept = [small for _, small in parts]
    del parts
    give_back_freed_memory()
    assert held - resident() > 48 * 2**20
    assert len(kept) == 64


def test_files_in_the_page_cache_are_free_in_a_container(tmp_path: Path):
    assert left_of_quota(tmp_path) == math.inf
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 250\ninactive_file 400\nactive_file 200\n")
    for limit, left in (("max", math.inf), ("1000", 700)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert left_of_quota(tmp_path) == left


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", ""])
def test_unknown_device_names_are_refused(name: str):
    with pytest.raises(ValueError, match="device must be"):
        pick_device(name)


def test_cuda_is_refused_where_there_is_none():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device must be auto or cpu where .* got 'cuda:0'"):
            pick_device("cuda:0")


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"device must be at most cuda:1, .* got 'cuda:2'"):
        pick_device("cuda:2")


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = default_num_threads()
    assert default_num_threads(2) == max(1, cores // 2)
    assert default_num_threads(10 * cores) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # of each process, as everywhere
    assert default_num_threads(2) == 3


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"tp_size must be at most the 2 GPUs .* got 4 ranks"):
        pick_device("cuda", index=1, of=4)


def test_planning_on_one_thread_leaves_the_stream_its_own():
    code = """
import torch
from minisgl.device import CpuDevice
from minisgl.step.executor import plan_on_one_thread
device = CpuDevice(num_threads=2)
plan_on_one_thread()
found = []
device.submit(lambda: found.append(torch.get_num_threads()))
device.record().wait()
device.close()
print(found[0], torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "1"]


def test_uploads_go_where_they_are_told_and_downloads_are_copies(device: CpuDevice):
    place = torch.full((5,), -1, dtype=torch.int32)
    sent = device.run(device.upload, np.array([3, 4, 5], np.int32), place)
    assert place.tolist() == [3, 4, 5, -1, -1]
    assert sent.data_ptr() == place.data_ptr()
    with pytest.raises(RuntimeError):
        device.run(device.upload, np.arange(6, dtype=np.int32), place)
    back = device.run(device.download, place)
    device.run(device.await_downloads)
    place.zero_()
    device.landed().wait()
    assert back.tolist() == [3, 4, 5, -1, -1]


def _offers_huge_pages() -> bool:
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return offered.exists() and "[never]" not in offered.read_text()


@pytest.mark.skipif(not _offers_huge_pages(), reason="this kernel has no huge pages to give")
def test_large_buffers_lie_in_huge_pages():
    def huge_kilobytes() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    before = huge_kilobytes()
    buffer = lazy_zeros((64 * 2**20,), torch.uint8)
    assert huge_kilobytes() == before  # nothing is committed before it is touched
    buffer.fill_(1)
    assert huge_kilobytes() - before >= 32 * 1024


def test_a_call_is_run_or_refused_while_the_device_closes():
    for _ in range(200):
        device = CpuDevice(num_threads=1)
        closer = threading.Thread(target=device.close)
        closer.start()
        with suppress(RuntimeError):  # "the device is closed"
            while True:
                assert device.run(lambda: 7) == 7
        closer.join()
