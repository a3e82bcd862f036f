"""Memory behind an NVLink multicast address: one access to it is an access to every rank's replica.

Source: the multicast objects of the CUDA driver API, and "NVLink SHARP" in NVIDIA's documents. The
handle of the object travels as a file descriptor, which only a local socket can pass on.
"""

import os
import socket
from typing import Any

ACCEPT_SECONDS = 120.0


def driver_call(name: str, *arguments: Any) -> Any:
    """The result of a CUDA driver function. RuntimeError names the function and the error."""
    from cuda.bindings import driver

    error, *results = getattr(driver, name)(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name}: {error.name}")
    return results[0] if results else None


def supports_multicast(device: int) -> bool:
    """Whether the device, its driver and its NVLink fabric support multicast."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED
    return bool(driver_call("cuDeviceGetAttribute", attribute, driver_call("cuDeviceGet", device)))


class Multicast:
    """One rank's part of a multicast object. The order of calls:

    `create` on rank 0 and `receive` on the others; `join` on all; only then `bind` on all.
    """

    def __init__(self, device: int, ranks: int, num_bytes: int) -> None:
        """num_bytes: of each replica, at least; the driver's granularity rounds it up."""
        from cuda.bindings import driver

        self._device = device
        self._fd_type = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = driver.CUmulticastObjectProp()
        self._properties.numDevices = ranks
        self._properties.size = num_bytes
        self._properties.handleTypes = int(self._fd_type)
        recommended = driver.CUmulticastGranularity_flags.CU_MULTICAST_GRANULARITY_RECOMMENDED
        self._granularity = driver_call("cuMulticastGetGranularity", self._properties, recommended)
        self._size = -(-num_bytes // self._granularity) * self._granularity
        self._properties.size = self._size
        self._object: Any = None
        self._memory: Any = None
        self.address = 0  # means every replica
        self.replica = 0  # this rank's

    def create(self) -> int:
        """Make the object. A descriptor of it for `send_descriptor`; the caller closes it."""
        self._object = driver_call("cuMulticastCreate", self._properties)
        return int(driver_call("cuMemExportToShareableHandle", self._object, self._fd_type, 0))

    def receive(self, descriptor: int) -> None:
        """Open the object that rank 0 made; closes the descriptor."""
        try:
            self._object = driver_call("cuMemImportFromShareableHandle", descriptor, self._fd_type)
        finally:
            os.close(descriptor)

    def join(self) -> None:
        driver_call("cuMulticastAddDevice", self._object, driver_call("cuDeviceGet", self._device))

    def bind(self) -> None:
        """Put memory of this device behind the object, map both; waits until all have joined."""
        from cuda.bindings import driver

        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._device
        properties.requestedHandleTypes = self._fd_type
        self._memory = driver_call("cuMemCreate", self._size, properties, 0)
        driver_call("cuMulticastBindMem", self._object, 0, self._memory, 0, self._size, 0)
        self.replica = self._map(self._memory, properties.location)
        self.address = self._map(self._object, properties.location)

    def _map(self, handle: Any, location: Any) -> int:
        from cuda.bindings import driver

        access = driver.CUmemAccessDesc()
        access.location = location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        address = driver_call("cuMemAddressReserve", self._size, self._granularity, 0, 0)
        driver_call("cuMemMap", address, self._size, 0, handle, 0)
        driver_call("cuMemSetAccess", address, self._size, [access], 1)
        return int(address)

    def close(self) -> None:
        """Undo all calls made so far."""
        for address in filter(None, (self.address, self.replica)):
            driver_call("cuMemUnmap", address, self._size)
            driver_call("cuMemAddressFree", address, self._size)
        for handle in (self._memory, self._object):
            if handle is not None:
                driver_call("cuMemRelease", handle)
        self.address = self.replica = 0
        self._memory = self._object = None


def listen() -> tuple[socket.socket, bytes]:
    """A listening socket in no file system, and its name for the other ranks of this machine."""
    name = b"\0minisgl-multicast-" + os.urandom(16).hex().encode()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(name)
    server.listen()
    server.settimeout(ACCEPT_SECONDS)
    return server, name


def send_descriptor(server: socket.socket, descriptor: int, times: int) -> None:
    """Give the descriptor to the next `times` processes of this user that connect."""
    while times > 0:
        connection, _ = server.accept()
        with connection:
            _, user, _ = _credentials(connection)
            if user == os.getuid():
                socket.send_fds(connection, [b"."], [descriptor])
                times -= 1


def receive_descriptor(name: bytes) -> int:
    """The descriptor that the process listening at `name` gives; the caller's to close."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(ACCEPT_SECONDS)
        client.connect(name)
        _, descriptors, _, _ = socket.recv_fds(client, 1, 1)
    if not descriptors:
        raise RuntimeError("no descriptor came with the multicast object's message")
    return descriptors[0]


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """(process, user, group) of the other end, as the kernel knows them."""
    size = 12
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    process, user, group = (int.from_bytes(raw[i : i + 4], "little") for i in range(0, size, 4))
    return process, user, group
