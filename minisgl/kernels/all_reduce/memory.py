"""Device memory that other processes map, and a word that host and device share.

Allocated through cuda-python. torch's allocator cannot be used: a handle exports a whole allocation
of the driver, and torch splits and reuses those.
"""

import ctypes
from typing import Any

HANDLE_BYTES = 64  # of cudaIpcMemHandle_t


def runtime_call(name: str, *arguments: Any) -> Any:
    """The result of a CUDA runtime function. RuntimeError names the function and the error."""
    from cuda.bindings import runtime

    error, *results = getattr(runtime, name)(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{name}: {error.name}")
    return results[0] if results else None


class PeerBuffer:
    """Zeroed memory of the current device. Its owner closes it after everyone who mapped it."""

    def __init__(self, num_bytes: int) -> None:
        self.address = int(runtime_call("cudaMalloc", num_bytes))
        runtime_call("cudaMemset", self.address, 0, num_bytes)
        runtime_call("cudaDeviceSynchronize")  # zero before any peer gets the handle

    def handle(self) -> bytes:
        """With it another process opens the memory."""
        handle = runtime_call("cudaIpcGetMemHandle", self.address)
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES)

    def close(self) -> None:
        runtime_call("cudaFree", self.address)


class MappedBuffer:
    """Another process's `PeerBuffer`, mapped into this one."""

    def __init__(self, handle: bytes) -> None:
        from cuda.bindings import runtime

        if len(handle) != HANDLE_BYTES:
            raise ValueError(f"handle must have {HANDLE_BYTES} bytes, got {len(handle)}")
        opened = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        lazily = runtime.cudaIpcMemLazyEnablePeerAccess
        self.address = int(runtime_call("cudaIpcOpenMemHandle", opened, lazily))

    def close(self) -> None:
        runtime_call("cudaIpcCloseMemHandle", self.address)


class HostWord:
    """A 32-bit word in pinned memory: kernels and host threads may read and write it at any time.

    The address is the same for both (unified addressing).
    """

    def __init__(self) -> None:
        from cuda.bindings import runtime

        flags = runtime.cudaHostAllocMapped | runtime.cudaHostAllocPortable
        self.address = int(runtime_call("cudaHostAlloc", 4, flags))
        self._word = ctypes.c_uint32.from_address(self.address)
        self._word.value = 0

    @property
    def value(self) -> int:
        return self._word.value

    @value.setter
    def value(self, value: int) -> None:
        self._word.value = value

    def close(self) -> None:
        """Later writes to `value` are ignored."""
        self._word = ctypes.c_uint32(self.value)
        runtime_call("cudaFreeHost", self.address)


def check_peer_access(device: int, peers: list[int]) -> None:
    """RuntimeError unless `device` reaches the memory of all `peers` by NVLink.

    Over PCIe NCCL is faster, so such peers are refused.
    """
    from cuda.bindings import runtime

    by_nvlink = runtime.cudaDeviceP2PAttr.cudaDevP2PAttrNativeAtomicSupported
    for peer in peers:
        if peer == device:
            continue
        if not runtime_call("cudaDeviceCanAccessPeer", device, peer):
            raise RuntimeError(f"GPU {device} cannot map the memory of GPU {peer}")
        if not runtime_call("cudaDeviceGetP2PAttribute", by_nvlink, device, peer):
            raise RuntimeError(f"GPU {device} reaches GPU {peer} over PCIe, not NVLink")
