"""Where work runs, behind one protocol: a CUDA device, or the CPU with a thread for a stream."""

import torch

from minisgl.device.cpu import CpuDevice, default_num_threads
from minisgl.device.cuda import CudaDevice
from minisgl.device.protocol import Cut, Device, Event, Graph

__all__ = [
    "CpuDevice",
    "CudaDevice",
    "Cut",
    "Device",
    "Event",
    "Graph",
    "pick_device",
]


def pick_device(name: str, *, index: int = 0, of: int = 1) -> Device:
    """The device called "cpu", "cuda", "cuda:N" or "auto" (cuda when there is one).

    For the `index`-th of `of` processes that work together on this machine: each has a GPU of its
    own, or its share of the cores. ValueError for another name, or for GPUs that are not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice(num_threads=default_num_threads(of))
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise ValueError(f"device must be auto or cpu where torch {why}, got {name!r}")
    if number and int(number) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"device must be at most cuda:{last}, the last GPU, got {name!r}")
    if of > torch.cuda.device_count():
        raise ValueError(
            f"tp_size must be at most the {torch.cuda.device_count()} GPUs that each machine "
            f"shows, got {of} ranks on this one"
        )
    return CudaDevice(int(number or index))
