"""Where work runs, behind one protocol: a CUDA device, or the CPU with a thread for a stream."""

import torch

from minisgl.device.cpu import CpuDevice
from minisgl.device.cuda import CudaDevice
from minisgl.device.protocol import Device, Event, Graph, Memory

__all__ = ["CpuDevice", "CudaDevice", "Device", "Event", "Graph", "Memory", "pick_device"]


def pick_device(name: str) -> Device:
    """The device called "cpu", "cuda", "cuda:N" or "auto" (cuda when there is one).

    ValueError for another name, RuntimeError when CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice()
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device is {name!r} but torch sees no CUDA device")
    return CudaDevice(int(index or 0))
