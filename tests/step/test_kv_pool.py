"""The KV pool's memory is committed a little ahead of its use."""

import re
import time
from pathlib import Path

import pytest
import torch

from minisgl.device import CpuDevice
from minisgl.step.kv_pool import AHEAD, KVPool, KVShape

SMAPS = Path("/proc/self/smaps")


def resident_bytes(tensor: torch.Tensor) -> int:
    """Of the mappings that hold the tensor."""
    found, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = int(span[1], 16), int(span[2], 16)
            inside = begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def wait_for_bytes(tensor: torch.Tensor, count: int) -> None:
    deadline = time.monotonic() + 30
    while resident_bytes(tensor) < count:
        assert time.monotonic() < deadline, f"{resident_bytes(tensor)} of {count}"
        time.sleep(0.01)


@pytest.mark.skipif(not SMAPS.exists(), reason="this system does not tell what is resident")
def test_memory_is_committed_ahead_and_keeps_what_it_holds():
    device = CpuDevice(num_threads=1)
    try:
        pool = KVPool(device, KVShape(3, 2, 64, torch.bfloat16), num_pages=60_000, page_size=1)
        storage, of_a_token = pool.storage, 3 * 2 * 2 * 64 * 2
        wait_for_bytes(storage, AHEAD * of_a_token)
        assert resident_bytes(storage) < storage.nbytes // 2  # huge pages reach further
        storage[:, :, AHEAD - 100 : AHEAD + 100] = 1.5
        pool.use(AHEAD + 99)
        pool.use(59_999)  # what lies between is committed too, and nothing behind the end
        wait_for_bytes(storage, storage.nbytes)
        assert storage.float().sum() == 200 * of_a_token // 2 * 1.5
    finally:
        device.close()


def test_a_step_that_uses_pages_while_the_device_closes_goes_on():
    device = CpuDevice(num_threads=1)
    pool = device.run(KVPool, device, KVShape(3, 2, 64, torch.bfloat16), 60_000, 1)
    device.submit(time.sleep, 0.3)
    device.submit(pool.use, 30_000)
    event = device.record()
    device.close()
    event.wait()  # would raise what failed
    pool.use(50_000)  # nor does this, when all is over
